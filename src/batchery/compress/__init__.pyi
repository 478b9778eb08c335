from . import quant as quant
