from .batch_sampler import ResumableBatchSampler as ResumableBatchSampler
from .hard_batch_callback import HardBatchCallback as HardBatchCallback
from .hard_batches import HardBatchSampler as HardBatchSampler
from .hard_batches import train_budget as train_budget
from .selection import RoundStats as RoundStats
