"""An n-gram model of tokens, for comparison: interpolated Kneser-Ney.

    p(w | h) = max(c(h w) - D, 0) / c(h .) + D N(h .) / c(h .) p(w | h')

h' is h without its first token, N(h .) the number of different tokens after h, D the discount of the order. The longest
order counts tokens, the shorter ones count what stands before them; below all of them lies the uniform distribution.

Improved backing-off for M-gram language modeling. Kneser and Ney, 1995. The interpolated form and the discounts
D = n1 / (n1 + 2 n2): An Empirical Study of Smoothing Techniques for Language Modeling. Chen and Goodman, 1999.
"""

import numpy as np

BITS = 12  # of one token: five of them in an int64


class KneserNey:
    """The model of order `order` (at most 5) of tokens [count], all below 4,096."""

    def __init__(self, tokens: np.ndarray, order: int = 5, vocabulary: int = 1 << BITS):
        if order * BITS > 62 or vocabulary > 1 << BITS:
            raise ValueError(f"order {order} with {vocabulary} tokens does not fit an int64")
        self.order, self.vocabulary = order, vocabulary
        self.tables: list[tuple[np.ndarray, ...]] = []
        grams = np.empty(0, np.int64)
        for n in range(order, 0, -1):
            # A shorter run counts once for each different token before it.
            runs = codes(tokens, n) if n == order else grams & ((1 << BITS * n) - 1)
            grams, counts = np.unique(runs, return_counts=True)
            ones, twos = (counts == 1).sum(), (counts == 2).sum()
            discount = ones / (ones + 2 * twos) if ones and twos else 0.5
            contexts, first, kinds = np.unique(grams >> BITS, return_index=True, return_counts=True)
            totals = np.add.reduceat(counts, first)
            self.tables.append((grams, counts, contexts, totals, kinds, discount))
        self.tables.reverse()

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """p of every token from number order - 1 on after the order - 1 before it: [count - order + 1]."""
        whole = codes(tokens, self.order)
        p = np.full(len(whole), 1 / self.vocabulary)
        for n, (grams, counts, contexts, totals, kinds, discount) in enumerate(self.tables, 1):
            code = whole & ((1 << BITS * n) - 1)
            count = found(grams, counts, code)
            total, kind = found(contexts, totals, code >> BITS), found(contexts, kinds, code >> BITS)
            known = total > 0
            share = np.where(known, total, 1)
            p = np.where(known, (np.maximum(count - discount, 0) + discount * kind * p) / share, p)
        return p


def codes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Each run of n tokens as one number: [count - n + 1]."""
    tokens = tokens.astype(np.int64)
    code = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for i in range(n):
        code = (code << BITS) | tokens[i : len(tokens) - n + 1 + i]
    return code


def found(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The values of what is asked, 0 for what is not among the sorted keys."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
