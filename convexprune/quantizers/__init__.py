"""Quantizers by name: they put kept values on a grid. To add a quantizer: a file here and a line in `QUANTIZERS`."""

from convexprune.quantizers._base import AbstractQuantizer
from convexprune.quantizers._descent import Descent
from convexprune.quantizers._published import GPTAQ, GPTQ, QEP, Nearest

QUANTIZERS: dict[str, type[AbstractQuantizer]] = {
    "descent": Descent,
    "gptaq": GPTAQ,
    "gptq": GPTQ,
    "qep": QEP,
    "rtn": Nearest,
}
