"""A mixture of recipes: their measurements, and the weighted mean and spread."""

from dataclasses import dataclass
from typing import Any

from glass_mlx.calibration.moments import Half, SequenceMoments
from glass_mlx.calibration.stability import Stability, compare
from glass_mlx.calibration.texts import ChatFrame, Recipe

import numpy as np


@dataclass(eq=False)
class MeasuredRecipe:
    """One recipe, and the measurements on its texts so far.

    Attributes:
        recipe: the recipe.
        identity: its record; see `Recipe.identity`.
        moments: mean and variance of its scores.
        frame: for chats, the tokens that the chat template writes around a user's turn.
        batches: the number of batches measured.
        exhausted: whether its corpus has no more texts.
    """

    recipe: Recipe
    identity: dict[str, Any]
    moments: SequenceMoments
    frame: ChatFrame | None
    batches: int = 0
    exhausted: bool = False

    @property
    def sequences(self) -> int:
        """The number of sequences measured."""
        return int(self.moments.sequences.sum())

    def describe(self) -> dict[str, Any]:
        """Return the record of the recipe, with the tokens and sequences measured."""
        return self.identity | {"tokens": self.moments.tokens, "sequences": self.sequences}


def _rate(recipe: MeasuredRecipe, path: str) -> np.ndarray:
    """Return the share of a recipe's tokens that reach each expert of a stack, (experts,).

    It is 0 for a recipe that has no more texts.
    """
    tokens = max(1, recipe.moments.tokens)
    return np.asarray((not recipe.exhausted) * recipe.moments.routed[path].sum(0) / tokens)


class Mixture:
    """Weighted statistics over the recipes of a prior.

    Args:
        recipes: the recipes and their measurements.
        statistics: the statistics that are measured.
    """

    def __init__(self, recipes: list[MeasuredRecipe], statistics: tuple[str, ...]) -> None:
        self.recipes, self.statistics = recipes, statistics

    @property
    def tokens(self) -> int:
        """The number of tokens measured."""
        return sum(recipe.moments.tokens for recipe in self.recipes)

    @property
    def sequences(self) -> int:
        """The number of sequences measured."""
        return sum(recipe.sequences for recipe in self.recipes)

    def mean(self, statistic: str, path: str, half: Half | None = None) -> np.ndarray:
        """Return the weighted mean score of each neuron of an FFN, (..., m) float64.

        Recipes that never reached an expert do not count there.

        Args:
            statistic: the statistic.
            path: the FFN.
            half: the half of the sequences. Default: all sequences.
        """
        means = [recipe.moments.mean(statistic, path, half) for recipe in self.recipes]
        return self._average(means, path, half)

    def spread(self, statistic: str, path: str) -> np.ndarray:
        """Return the standard deviation over sequences of each neuron's score, (..., m) float64."""
        mean = self.mean(statistic, path)
        variances = [
            moments.variance(statistic, path) + (moments.mean(statistic, path) - mean) ** 2
            for moments in (recipe.moments for recipe in self.recipes)
        ]
        spread: np.ndarray = np.sqrt(self._average(variances, path))
        return spread

    def routed(self, path: str) -> np.ndarray:
        """Return the number of tokens that were routed to each expert of a stack, (experts,)."""
        return np.asarray(sum(recipe.moments.routed[path].sum(0) for recipe in self.recipes))

    def short_experts(self, minimum: int, further: float) -> dict[str, np.ndarray]:
        """Return which experts lack tokens that further texts are expected to give them.

        An expert that texts hardly ever reach does not count, because it would take no end of them.

        Args:
            minimum: the number of tokens that are enough.
            further: the number of tokens that may still be measured, from any recipe.

        Returns:
            (experts,) bool by stack, without stacks where there are no such experts.
        """
        short = {}
        for path in self.recipes[0].moments.routed:
            counts = self.routed(path)
            rates = [_rate(recipe, path) for recipe in self.recipes]
            expected = counts + further * np.max(rates, axis=0)
            if (lacking := (counts < minimum) & (expected >= minimum)).any():
                short[path] = lacking
        return short

    def best_recipe(self, short: dict[str, np.ndarray]) -> MeasuredRecipe:
        """Return the recipe whose tokens reach some experts most often.

        Args:
            short: (experts,) bool by stack, whether an expert counts.
        """
        return max(
            self.recipes,
            key=lambda recipe: sum(_rate(recipe, p)[own].sum() for p, own in short.items()),
        )

    @property
    def vocabulary(self) -> np.ndarray:
        """The weighted mean flattened prediction of each token, (V,) float64."""
        means = [recipe.moments.vocabulary / recipe.moments.tokens for recipe in self.recipes]
        weights = [recipe.recipe.weight for recipe in self.recipes]
        return np.asarray(np.average(means, axis=0, weights=weights))

    def _average(self, values: list[np.ndarray], path: str, half: Half | None = None) -> np.ndarray:
        """Return the mean over the recipes with tokens, weighted by the recipes' weights."""
        weights = [
            recipe.recipe.weight * (recipe.moments.weight(path, half) > 0)
            for recipe in self.recipes
        ]
        total = np.sum(weights, axis=0)
        weighted = np.sum([w * v for w, v in zip(weights, values, strict=True)], axis=0)
        return np.asarray(weighted / np.where(total > 0, total, 1))

    def stability(self) -> dict[str, Stability]:
        """Compare the scores of the two halves of the sequences.

        Returns:
            The stability by statistic. It is empty while a half has no sequences of some recipe.
        """
        complete = [recipe for recipe in self.recipes if recipe.moments.sequences.all()]
        if not all(recipe in complete or recipe.exhausted for recipe in self.recipes):
            return {}
        if not complete:  # every corpus ended after one sequence at most
            return {}
        mixture = Mixture(complete, self.statistics)
        paths = [*complete[0].moments.sums[self.statistics[0]]]
        return {
            name: compare(
                {path: mixture.mean(name, path, 0) for path in paths},
                {path: mixture.mean(name, path, 1) for path in paths},
            )
            for name in self.statistics
        }
