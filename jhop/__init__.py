from jhop._lift import lift
from jhop._tensor import Tensor, tensor
