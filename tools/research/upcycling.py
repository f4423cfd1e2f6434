"""Turn the FFNs of a dense model into mixtures of experts whose truth is known.

Copies (as in sparse upcycling, arXiv 2212.05055): every expert is the whole FFN, and a token's
experts are those whose region of the inputs it falls into. The weights of a token's experts sum to
1, so the mixture computes exactly what the dense model does.

Clusters (as in MoEfication, arXiv 2110.01786): the neurons are split into experts of equal size by
the directions of their gates, and a router predicts which experts are most active for a token. The
other experts are left out, so the mixture is near the dense model, but not the same.
"""

from glass_mlx.models import FFN, find_ffns, with_call, with_replacements, with_taps

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

KINDS = ("copies", "clusters")

_ITERATIONS = 12


class Mixture(nn.Module):
    """A mixture of experts in place of an FFN.

    Args:
        router: (experts, hidden + 1) weights and a bias for the logit of each expert.
        experts: the stack of experts.
        per_token: the number of experts for each token.
        is_average: whether the experts' outputs are averaged, by the softmax of their logits, or
            summed.
    """

    def __init__(
        self, router: np.ndarray, experts: SwitchGLU, per_token: int, is_average: bool
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(router.shape[1] - 1, len(router))
        self.gate.weight = mx.array(router[:, :-1].astype(np.float32))
        self.gate.bias = mx.array(router[:, -1].astype(np.float32))
        self.switch_mlp = experts
        self._per_token, self._is_average = per_token, is_average

    def __call__(self, x: mx.array) -> mx.array:
        """Compute (..., hidden) outputs of (..., hidden) inputs."""
        logits = self.gate(x)
        chosen = mx.argpartition(-logits, kth=self._per_token - 1, axis=-1)[..., : self._per_token]
        outputs = self.switch_mlp(x, chosen)
        if not self._is_average:
            return outputs.sum(-2)
        weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
        return (outputs * weights[..., None]).sum(-2)


def upcycle(
    model: nn.Module, texts: list[list[int]], kind: str, experts: int, per_token: int, seed: int = 0
) -> nn.Module:
    """Return a model whose FFNs are mixtures of experts. The given model does not change.

    Args:
        model: a dense model with gated FFNs in float32, whose layers have an `mlp`.
        texts: token ids of texts that determine the routers.
        kind: one of `KINDS`.
        experts: the number of experts of each layer.
        per_token: the number of experts for each token.
        seed: the seed of the clusters.
    """
    ffns, rng = find_ffns(model), np.random.default_rng(seed)
    inputs, hidden = _observe(model, ffns, texts)
    mixtures: dict[str, nn.Module] = {}
    for ffn in ffns:
        make = _copies if kind == "copies" else _clusters
        router, stack = make(ffn, inputs[ffn.path], hidden[ffn.path], experts, rng)
        mixtures[ffn.path] = Mixture(router, stack, per_token, kind == "copies")
        mx.eval(mixtures[ffn.path].parameters())
    return with_replacements(model, mixtures)


def _observe(
    model: nn.Module, ffns: list[FFN], texts: list[list[int]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the inputs (tokens, hidden) and hidden vectors (tokens, m) of each FFN."""
    inputs: dict[str, list[mx.array]] = {ffn.path: [] for ffn in ffns}
    hidden: dict[str, list[mx.array]] = {ffn.path: [] for ffn in ffns}

    def observe(path: str, values: mx.array) -> mx.array:
        hidden[path].append(values[0])
        return values

    def recording(path: str, module: nn.Module) -> nn.Module:
        def call(x: mx.array) -> mx.array:
            inputs[path].append(x[0])
            return module(x)

        return with_call(module, call)

    tapped = with_taps(model, observe, ffns=ffns)
    modules = dict(tapped.named_modules())
    recorded = {ffn.path: recording(ffn.path, modules[ffn.path]) for ffn in ffns}
    reader = with_replacements(tapped, recorded)
    for text in texts:
        mx.eval(reader(mx.array([text])), [*inputs.values()], [*hidden.values()])
    joined = (
        {path: np.array(mx.concatenate(parts)) for path, parts in values.items()}
        for values in (inputs, hidden)
    )
    first, second = joined
    return first, second


def _normalized(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))


def _copies(
    ffn: FFN, inputs: np.ndarray, hidden: np.ndarray, experts: int, rng: np.random.Generator
) -> tuple[np.ndarray, SwitchGLU]:
    """Return a router by spherical k-means of the inputs, and copies of the FFN."""
    points = _normalized(inputs - inputs.mean(0))
    centers = points[rng.choice(len(points), experts, replace=False)]
    for _ in range(_ITERATIONS):
        nearest = np.argmax(points @ centers.T, axis=-1)
        sums = np.stack([points[nearest == e].sum(0) for e in range(experts)])
        centers = _normalized(np.where(np.abs(sums).sum(-1, keepdims=True) > 0, sums, centers))
    router = np.concatenate([centers, -centers @ inputs.mean(0)[:, None]], axis=-1)
    return router, _stack(ffn, np.tile(np.arange(ffn.width), (experts, 1)))


def _clusters(
    ffn: FFN, inputs: np.ndarray, hidden: np.ndarray, experts: int, rng: np.random.Generator
) -> tuple[np.ndarray, SwitchGLU]:
    """Return a router by linear regression of what experts put out, and clusters of neurons."""
    points = _normalized(np.array(ffn.expand["gate_proj"].weight))
    size = ffn.width // experts
    centers = points[rng.choice(len(points), experts, replace=False)]
    for _ in range(_ITERATIONS):
        owners = _balanced(points @ centers.T, size)
        centers = _normalized(np.stack([points[owners == e].mean(0) for e in range(experts)]))
    members = np.stack([np.flatnonzero(owners == e) for e in range(experts)])
    strength = np.abs(hidden) * np.linalg.norm(np.array(ffn.contract[1].weight), axis=0)
    energy = np.stack([strength[:, rows].sum(-1) for rows in members], axis=-1)
    x = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=-1)
    ridge = 1e-2 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
    return np.linalg.solve(x.T @ x + ridge, x.T @ energy).T, _stack(ffn, members)


def _balanced(similarity: np.ndarray, size: int) -> np.ndarray:
    """Assign each of m points to a cluster of a fixed size, the most certain points first."""
    owners = np.full(len(similarity), -1)
    room = np.full(similarity.shape[1], size)
    two = np.sort(similarity, axis=-1)[:, -2:]
    for point in np.argsort(two[:, 0] - two[:, 1]):
        free = np.where(room > 0, similarity[point], -np.inf)
        owners[point] = np.argmax(free)
        room[owners[point]] -= 1
    return owners


def _stack(ffn: FFN, members: np.ndarray) -> SwitchGLU:
    """Return a stack of experts, each with some neurons (n,) of an FFN."""
    name, down = ffn.contract
    rows = mx.array(members)
    stack = SwitchGLU(1, 1, 1)
    for part in ("gate_proj", "up_proj"):
        stack[part].weight = ffn.expand[part].weight[rows]
    stack[name].weight = mx.moveaxis(down.weight[:, rows], 0, 1)
    return stack
