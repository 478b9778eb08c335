from .lamb import LAMB as LAMB
from .lars import LARS as LARS
from .layerwise import layer_adaptation_groups as layer_adaptation_groups
from .layerwise import scale_lr as scale_lr
from .layerwise import warmup_fraction as warmup_fraction
