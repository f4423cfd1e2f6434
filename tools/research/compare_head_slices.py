"""Compare slices of attention heads with slices of FFNs at equal bytes.

One query head of each group that shares a key-value head is dropped, in some or all layers: its
rows of q and its columns of o. Its mean replaces it. Keys and values stay as they are.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from glass_mlx.models import with_modules

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from compare_layer_budgets import budgets
from cuts import (
    SHRINKAGE_TOKENS,
    WRITTEN,
    Decoder,
    FFNCut,
    Masked,
    Reference,
    counts,
    development_texts,
    open_model,
    own_texts,
    row,
    score,
)

_SENSITIVITY_TEXTS = 4

STATISTICS = ("input", "output", "fluctuation")


class _Capture(nn.Module):
    """An output projection that keeps its inputs."""

    def __init__(self, layer: nn.Module, inputs: list[mx.array]) -> None:
        super().__init__()
        self.layer = layer
        self._inputs = inputs

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x)
        return self.layer(x)


class Heads:
    """The attention heads of a model, and what they put into the output projection.

    Args:
        model: the dense model.

    Attributes:
        paths: the path of the attention of each layer.
        outputs: its output projection.
        heads: the number of query heads H of a layer.
        groups: the number of key-value heads of a layer.
        size: the size D of a head.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, args = model, model.args
        self.paths = [f"model.layers.{n}.self_attn" for n in range(len(model.layers))]
        self.outputs = [layer.self_attn.o_proj for layer in model.layers]
        self.heads, self.groups = args.num_attention_heads, args.num_key_value_heads
        self.size = self.outputs[0].weight.shape[1] // self.heads
        # ||W_h x_h||^2 = x_h' (W_h' W_h) x_h
        self._grams = []
        for output in self.outputs:
            w = output.weight.T.reshape(self.heads, self.size, -1)
            self._grams.append(w @ w.swapaxes(1, 2))
        mx.eval(self._grams)

    def observe(self, text: Reference) -> list[mx.array]:
        """Return the inputs (H, T, D) of each output projection, for the read written tokens."""
        inputs: list[mx.array] = []
        captured = with_modules(
            self.model,
            {
                path: {"o_proj": _Capture(output, inputs)}
                for path, output in zip(self.paths, self.outputs, strict=True)
            },
        )
        prompt, written = text.text.prompt, text.text.written
        captured(mx.array([*prompt, *written[:-1]])[None])
        kept = [x[0, len(prompt) :].reshape(-1, self.heads, self.size) for x in inputs]
        kept = [mx.contiguous(x.swapaxes(0, 1)) for x in kept]
        mx.eval(kept)
        return kept

    def statistics(self, inputs: Sequence[mx.array]) -> dict[str, np.ndarray]:
        """Return the statistics (layers, H) of the heads, each a share of its layer."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in STATISTICS}
        for x, gram in zip(inputs, self._grams, strict=True):
            squares = np.array(mx.square(x).sum(-1))  # (H, T)
            energies = np.array(((x @ gram) * x).sum(-1))
            mean = x.mean(1, keepdims=True)
            constant = np.array(((mean @ gram) * mean).sum((1, 2)))
            rows["input"].append((squares / squares.sum(0)).mean(1))
            rows["output"].append((energies / energies.sum(0)).mean(1))
            changes = np.maximum(energies.mean(1) - constant, 1e-12)
            rows["fluctuation"].append(changes / changes.sum())
        return {name: np.array(values) for name, values in rows.items()}

    def dropped(self, scores: np.ndarray) -> np.ndarray:
        """Return flags (H,) of the head with the lowest score in each group."""
        lowest = scores.reshape(self.groups, -1).argmin(1)
        flags = np.zeros((self.groups, self.heads // self.groups), bool)
        flags[np.arange(self.groups), lowest] = True
        return flags.reshape(-1)


class HeadCut:
    """FFN slices, and in some layers one head less in each group.

    Args:
        text: the text.
        ffns: the cut of the FFNs.
        heads: the heads.
        inputs: what they put into the output projections in this text.
        prior: the statistic of the heads over other text.
        layers: the layers that drop heads.
        statistic: the statistic that ranks heads.
        weight: the weight of the prior, for logarithms of the statistics.
        compensated: whether the mean replaces a dropped head.
    """

    def __init__(
        self,
        text: Reference,
        ffns: FFNCut,
        heads: Heads,
        inputs: list[mx.array],
        prior: Mapping[str, np.ndarray],
        layers: Sequence[int],
        statistic: str,
        weight: float,
        compensated: bool,
    ) -> None:
        self._text, self._ffns, self._heads, self._inputs = text, ffns, heads, inputs
        self._prior, self._layers = np.log(prior[statistic]), layers
        self._statistic, self._weight, self._compensated = statistic, weight, compensated

    def __call__(self, generated: int) -> nn.Module:
        """Return the model that decodes after some generated tokens."""
        read = generated - 1
        so_far = [x[:, :read] for x in self._inputs]
        local = np.log(self._heads.statistics(so_far)[self._statistic])
        fused = (1 - self._weight) * local + self._weight * self._prior
        trust = read / (read + SHRINKAGE_TOKENS) if self._compensated else 0
        modules = {}
        for n in self._layers:
            kept = np.repeat(~self._heads.dropped(fused[n]), self._heads.size)
            constants = trust * np.array(so_far[n].mean(1)).reshape(-1)
            output = self._heads.outputs[n]
            modules[self._heads.paths[n]] = {"o_proj": Masked(output, kept, constants)}
        return with_modules(self._heads.model, self._ffns.modules(generated) | modules)


def main() -> None:
    """Measure which layers can spare heads, and score the cuts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--density", type=float, nargs="+", required=True)
    parser.add_argument("--own", type=int, default=8, help="Texts of the model's own.")
    parser.add_argument("--prompts", type=int, default=12, help="Development prompts.")
    parser.add_argument("--texts", type=Path, help="Folder to keep the texts in.")
    args = parser.parse_args()

    session, tokenizer, selector = open_model(args.model)
    files = [args.texts and args.texts / f"{kind}.json" for kind in ("own", "development")]
    heads, widths = Heads(session.model), session.widths
    hidden = session.ffns[0].contract[1].weight.shape[0]
    neurons_per_head = 2 * heads.size / 3
    print(
        f"{heads.heads} heads of {heads.size}, {heads.groups} groups, hidden size {hidden}: a "
        f"head is as large as {neurons_per_head:.1f} neurons"
    )

    # 1) The prior of the heads: the mean of the statistics over the model's own texts.
    own = own_texts(session, tokenizer, WRITTEN, files[0])[: args.own]
    own_inputs = [heads.observe(text) for text in own]
    all_statistics = [heads.statistics(inputs) for inputs in own_inputs]
    prior = {
        name: np.mean([statistics[name] for statistics in all_statistics], 0) for name in STATISTICS
    }

    def maker(
        inputs: Mapping[int, list[mx.array]],
        budget: Mapping[str, int],
        layers: Sequence[int],
        statistic: str = "fluctuation",
        weight: float = 0.45,
        compensated: bool = True,
    ) -> Callable[[Reference], Decoder]:
        return lambda text: HeadCut(
            text, FFNCut(text, selector, budget), heads, inputs[id(text)], prior, layers,
            statistic, weight, compensated,
        )  # fmt: skip

    # 2) The layers in the order of the KL that dropping heads in this layer alone adds.
    few = own[:_SENSITIVITY_TEXTS]
    by_text = {id(text): inputs for text, inputs in zip(own, own_inputs, strict=True)}
    budget = counts(selector, widths, args.density[0])
    base, tokens = score(few, lambda text: FFNCut(text, selector, budget))
    added = []
    for n in range(len(heads.paths)):
        sums, _ = score(few, maker(by_text, budget, [n]))
        added.append((sums - base).sum() / tokens.sum())
    order = np.argsort(added)
    print("own text, KL without heads dropped", round(base.sum() / tokens.sum(), 4))
    print("added by layer", [round(float(a), 4) for a in added], flush=True)
    del own, own_inputs, few, by_text

    # 3) The cuts, on the development prompts.
    texts = development_texts(session, tokenizer, WRITTEN, files[1])[: args.prompts]
    inputs = {id(text): heads.observe(text) for text in texts}
    for number, density in enumerate(args.density):
        budget = counts(selector, widths, density)
        total = sum(budget.values())
        base, tokens = score(texts, lambda text, b=budget: FFNCut(text, selector, b))
        print(row(f"FFN {density}", base, None, tokens), flush=True)
        by_count: dict[int, np.ndarray] = {}
        everything = len(order)
        for layers in (everything // 4, everything // 2, everything):
            if number and layers == everything // 4:
                continue
            fewer = round(layers * heads.groups * neurons_per_head)
            free = [path for path in widths if budget[path] < widths[path]]
            factor = 1 - fewer / sum(budget[path] for path in free)
            shares = {p: budget[p] / widths[p] * (factor if p in free else 1) for p in widths}
            smaller = budgets(widths, shares, total - fewer)
            sums, _ = score(texts, lambda text, b=smaller: FFNCut(text, selector, b))
            by_count[layers] = sums
            name = f"FFN {sum(smaller.values()) / sum(widths.values()):.4f}"
            print(row(f"{name}, vs FFN {density}", sums, base, tokens), flush=True)
            variants: list[dict[str, object]] = [{}]
            if layers == everything // 2 and not number:
                variants += [
                    {"statistic": "input"}, {"statistic": "output"}, {"weight": 0.0},
                    {"weight": 1.0}, {"compensated": False},
                ]  # fmt: skip
            for variant in variants:
                ours, _ = score(texts, maker(inputs, budget, order[:layers], **variant))
                name = f"heads of {layers} layers {variant or ''}, vs equal FFN"
                print(row(name, ours, by_count[layers], tokens), flush=True)


if __name__ == "__main__":
    main()
