"""The rules of AttnLRP and CP-LRP in float64 numpy, each as the papers state it.

A program is written with these operations. Each notes how relevance goes back through
it, and what of it goes nowhere. Nothing here is a gradient.
"""

import numpy as np


class Part:
    """A value of the program, and the relevance that it has got so far."""

    def __init__(self, value):
        self.value = np.asarray(value, np.float64)
        self.relevance = np.zeros_like(self.value)


class Rules:
    """Operations on `Part`s; `absorbed` is the relevance that goes nowhere."""

    def __init__(self, conservative):
        self.conservative = conservative
        self.steps = []
        self.absorbed = {"biases": 0.0, "softmaxes": 0.0}

    def explain(self, logits, target):
        """Passes a logit back to every part there is."""
        logits.relevance[target] = logits.value[target]
        for step in reversed(self.steps):
            step()

    def step(self, value, *rules):
        """`rules` pair an operand with what it gets of the result's relevance."""
        out = Part(value)

        def back():
            for operand, rule in rules:
                operand.relevance = operand.relevance + rule(out.relevance)

        self.steps.append(back)
        return out

    def shaped(self, x, forth, back):
        return self.step(forth(x.value), (x, back))

    def linear(self, x, w):
        """R_i = x_i sum_j w_ij R_j / z_j."""
        z = x.value @ w
        return self.step(z, (x, lambda r: x.value * ((r / z) @ w.T)))

    def bias(self, x, b):
        z = x.value + b

        def rule(r):
            self.absorbed["biases"] += (b * r / z).sum()
            return x.value * r / z

        return self.step(z, (x, rule))

    def add(self, x, y):
        z = x.value + y.value
        return self.step(
            z, (x, lambda r: x.value * r / z), (y, lambda r: y.value * r / z)
        )

    def norm(self, x):
        """Passes relevance on, as does every function of one element."""
        size = np.sqrt((x.value**2).mean(axis=-1, keepdims=True) + 1e-6)
        return self.step(x.value / size, (x, lambda r: r))

    def curved(self, x, function):
        return self.step(function(x.value), (x, lambda r: r))

    def gated(self, gate, x):
        """Half to each; or a gate has none."""
        if self.conservative:
            return self.step(gate.value * x.value, (x, lambda r: r))
        half = lambda r: r / 2
        return self.step(gate.value * x.value, (gate, half), (x, half))

    def softmax(self, x, scale, seen):
        """R_i = x_i (R_i - s_i sum_j R_j); what is not seen has none."""
        scores = np.where(seen, x.value * scale, 0)
        s = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        s = s / s.sum(axis=-1, keepdims=True)

        def rule(r):
            total = r.sum(axis=-1, keepdims=True)
            mean = (scores * s).sum(axis=-1, keepdims=True)
            self.absorbed["softmaxes"] += (r * (1 - scores + mean)).sum()
            return scores * (r - s * total)

        return self.step(s, (x, rule))

    def matmul(self, a, b, share=0.5):
        """R_a = a sum_j b_j R_j / 2 z_j, and the same of b; or all of it to b."""
        z, swap = a.value @ b.value, lambda v: v.swapaxes(-1, -2)
        of_a = lambda r: a.value * (share * r / z @ swap(b.value))
        of_b = lambda r: b.value * (swap(a.value) @ (share * r / z))
        rules = [(a, of_a), (b, of_b)]
        return self.step(z, *rules[share == 1 :])

    def dense(self, x, w, name):
        out = self.linear(x, w[name])
        return self.bias(out, w[f"{name}_bias"]) if f"{name}_bias" in w else out

    def attend(self, x, y, w, heads, seen, scale=0.5):
        """Of as many heads of keys and values as their weights are wide."""
        dim = w["query"].shape[1] // heads
        split = lambda part: self.shaped(
            part,
            lambda v: v.reshape(len(v), -1, dim).transpose(1, 0, 2),
            lambda r: r.transpose(1, 0, 2).reshape(r.shape[1], -1),
        )
        query, key, value = (
            split(self.dense(z, w, name))
            for z, name in ((x, "query"), (y, "key"), (y, "value"))
        )
        groups = heads // len(key.value)
        repeat = lambda part: self.shaped(
            part,
            lambda v: np.repeat(v, groups, axis=0),
            lambda r: r.reshape(-1, groups, *r.shape[1:]).sum(axis=1),
        )
        swap = lambda v: v.swapaxes(1, 2)
        key = self.shaped(repeat(key), swap, swap)
        maps = self.softmax(self.matmul(query, key), scale, seen)
        share = 1 if self.conservative else 0.5
        mixed = self.matmul(maps, repeat(value), share)
        joined = self.shaped(
            mixed,
            lambda v: v.transpose(1, 0, 2).reshape(len(x.value), -1),
            lambda r: r.reshape(len(r), heads, -1).transpose(1, 0, 2),
        )
        return self.dense(joined, w, "out")

    def row(self, x, number):
        def back(r):
            whole = np.zeros_like(x.value)
            whole[number] = r
            return whole

        return self.shaped(x, lambda v: v[number], back)
