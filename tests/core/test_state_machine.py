"""Any sequence of calls leaves the weights at w + v inside the ball, or exactly at the start."""

import copy
import pickle
from contextlib import suppress

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from awp_optim import AWP

SHAPES = [(4, 3), (2, 3, 2, 2), (5,), (1, 6)]


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which Hypothesis keeps for itself."""


class AWPMachine(RuleBasedStateMachine):
    """AWP beside a plain optimizer on its own copies of the weights: the expected start."""

    @initialize(
        seed=st.integers(0, 1000),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        gamma=st.sampled_from([1e-3, 0.05, 0.5]),
        norm=st.sampled_from(["l1", "l2"]),
        steps=st.integers(1, 3),
        foreach=st.sampled_from([True, False]),
        direction=st.sampled_from(["gradient", "gradient", "random"]),
    )
    def build(self, seed, dtype, gamma, norm, steps, foreach, direction):
        torch.manual_seed(seed)
        self.gamma, self.order, self.dtype = gamma, int(norm[1]), dtype
        self.foreach = foreach
        self.params = [nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
        awp = {"norm": norm, "ascent_steps": steps, "foreach": foreach, "direction": direction}
        self.opt = AWP(self.params, torch.optim.SGD, gamma, **awp, lr=0.1, momentum=0.9)
        self.start_twin()

    def start_twin(self):
        self.twin = [nn.Parameter(p.detach().clone()) for p in self.params]
        self.base = torch.optim.SGD(self.twin, lr=0.1, momentum=0.9, foreach=self.foreach)

    def step_twin(self):
        for p, q in zip(self.params, self.twin, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        self.base.step()

    @rule(kind=st.sampled_from(["normal", "normal", "zero", "nan", "inf", "none"]))
    def backpropagate(self, kind):
        for p in self.params:
            p.grad = torch.randn(p.shape).to(self.dtype)
        chosen = self.params[0]
        if kind == "none":
            chosen.grad = None
        elif kind == "zero":
            chosen.grad.zero_()
        elif kind != "normal":  # an ascent meets the bad gradient, the next update a good one
            good, chosen.grad = chosen.grad, chosen.grad.clone()
            chosen.grad[0, 0] = float(kind)
            self.opt.first_step()
            chosen.grad = good

    @rule(zero_grad=st.booleans())
    def first_step(self, zero_grad):
        self.opt.first_step(zero_grad=zero_grad)
        assert self.opt.is_perturbed

    @rule(call=st.sampled_from(["second_step", "step"]), zero_grad=st.booleans())
    def finish(self, call, zero_grad):
        if not self.opt.is_perturbed:
            with pytest.raises(RuntimeError):
                getattr(self.opt, call)()
            return
        self.step_twin()
        if call == "step":
            self.opt.step()
        else:
            self.opt.second_step(zero_grad=zero_grad)

    @rule()
    def restore(self):
        self.opt.restore()
        assert not self.opt.is_perturbed

    @rule(fails=st.booleans())
    def inside_perturbed(self, fails):
        with suppress(Interrupted), self.opt.perturbed():
            self.the_weights_are_where_they_should_be()
            if fails:
                raise Interrupted
        assert not self.opt.is_perturbed

    @precondition(lambda self: not self.opt.is_perturbed)
    @rule(fails_at=st.integers(0, 4))
    def step_with_closure(self, fails_at):
        calls = []

        def closure():
            calls.append(1)
            if len(calls) == fails_at:
                raise Interrupted
            for p in self.params:
                p.grad = torch.randn(p.shape).to(self.dtype)
            return torch.zeros(())

        try:
            self.opt.step(closure)
        except Interrupted:
            return
        self.step_twin()

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.opt.zero_grad(set_to_none=to_none)

    @rule()
    def save_and_load(self):
        if self.opt.is_perturbed:
            with pytest.raises(RuntimeError):
                self.opt.state_dict()
            with pytest.raises(RuntimeError):
                pickle.dumps(self.opt)
        else:
            self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))

    @rule(bad=st.sampled_from([{"gamma": -1.0}, {"norm": "l3"}, {"direction": "down"}]))
    def a_bad_setting_changes_nothing_but_may_restore_the_weights(self, bad):
        group = self.opt.param_groups[0]
        good = {name: group[name] for name in bad}
        before = [p.detach().clone() for p in self.params]
        group.update(bad)
        with pytest.raises(ValueError, match="must be"):
            self.opt.first_step()
        group.update(good)
        assert all(torch.equal(p, b) for p, b in zip(self.params, before, strict=True))

    @invariant()
    def the_weights_are_where_they_should_be(self):
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[self.dtype]
        for p, w in zip(self.params, self.twin, strict=True):
            p, w = p.detach(), w.detach()
            if self.opt.is_perturbed and p.ndim > 1:
                size = w.double().norm(self.order)
                v = (p.double() - w.double()).norm(self.order)
                assert v <= self.gamma * size * (1 + 1e-5) + rounding * size
            else:
                assert torch.equal(p, w)


TestAWPMachine = AWPMachine.TestCase
TestAWPMachine.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
