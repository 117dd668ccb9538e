"""The losses. Each is a mean, in fp32."""

from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of next-token distributions softened by `temperature` (Hinton et al. 2015), in nats.

    Logits are [tokens, vocabulary]. Scaled by temperature squared, which keeps the gradient's size.
    """
    own = functional.log_softmax(student.float() / temperature, -1)
    wanted = functional.log_softmax(teacher.float() / temperature, -1)
    return functional.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def direction(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of vectors [..., width] of equal width."""
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def pair_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the cosines between the batch's members are from the teacher's (Park et al. 2019, relations by pairs).

    Vectors are [rows, width]; the widths may differ. The root of the mean square over pairs of different members.
    """
    own, wanted = (functional.normalize(vectors.float(), dim=-1) for vectors in (student, teacher))
    off = own @ own.T - wanted @ wanted.T
    rows = len(own)
    return (off.square().sum() / max(rows * (rows - 1), 1) + 1e-12).sqrt()
