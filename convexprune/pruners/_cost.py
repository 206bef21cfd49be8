"""The needs of a method, by which the memory and the time of a run are predicted."""

from typing import NamedTuple


class Cost(NamedTuple):
    """The needs of a method for a stack [m n]; by default those of a method that computes no products.

    `squares` matrices [n n] and `rectangles` [m n] of float32 live at the peak, beside the moments, and `apart` of the
    tallest operator's shape, if operators are solved singly (counted by torch's allocator, tests/unit/test_memory.py).
    `products` [m n] x [n n] are counted on real layers (lab/benchmarks.md); `factorisations` are n^3 operations in
    Cholesky factors and the like. `overhead` is measured time over the time of this arithmetic at the rate of a bare
    product (benchmarks/layer.py). All stay constants: a group that is pruned here in a second is so narrow that
    extrapolated times were 1.2 to 2.7 times the true times.
    """

    squares: float = 5.0
    rectangles: float = 7.9
    products: float = 0.0
    factorisations: float = 0.0
    overhead: float = 1.0
    apart: float = 0.0

    def then(self, other: "Cost") -> "Cost":
        """Return the needs of two methods, one after the other."""
        products = self.products + other.products
        time = self.overhead * self.products + other.overhead * other.products
        return Cost(
            max(self.squares, other.squares),
            max(self.rectangles, other.rectangles),
            products,
            self.factorisations + other.factorisations,
            time / products if products else max(self.overhead, other.overhead),
            max(self.apart, other.apart),
        )
