import pytest
import torch
from torch.nn import functional as F

from compodistill.train.losses import attention_cosine, topk_kl


def pair(n=5, c=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, c, generator=g), 3 * torch.randn(n, c, generator=g)


def kept(teacher, k):
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return ids, logprobs


def full_kl(teacher, student):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_topk_kl_with_every_id_is_the_full_kl(tail):
    teacher, student = pair()
    got = topk_kl(student, *kept(teacher, 40), tail=tail).mean()
    torch.testing.assert_close(got, full_kl(teacher, student), rtol=1e-5, atol=1e-6)


def test_bucketed_kl_is_a_lower_bound_that_grows_with_k():
    teacher, student = pair()
    values = [float(topk_kl(student, *kept(teacher, k)).mean()) for k in (1, 4, 16, 39)]
    assert values == sorted(values)
    assert values[-1] <= float(full_kl(teacher, student)) + 1e-6


def test_bucketed_kl_equals_the_kl_of_the_k_plus_one_classes():
    teacher, student = pair()
    ids, logprobs = kept(teacher, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    p_kept, q_kept = p.gather(-1, ids), q.gather(-1, ids)
    p_all = torch.cat([p_kept, 1 - p_kept.sum(-1, keepdim=True)], -1)
    q_all = torch.cat([q_kept, 1 - q_kept.sum(-1, keepdim=True)], -1)
    expected = (p_all * (p_all.log() - q_all.log())).sum(-1).mean()
    torch.testing.assert_close(topk_kl(student, ids, logprobs).mean(), expected, rtol=1e-4, atol=1e-5)


def test_student_that_equals_the_teacher_has_no_loss_and_no_gradient():
    teacher, _ = pair()
    for tail in ("bucket", "renormalise"):
        student = teacher.clone().requires_grad_()
        loss = topk_kl(student, *kept(teacher, 8), tail=tail).mean()
        loss.backward()
        assert abs(float(loss.detach())) < 1e-5
        assert float(student.grad.abs().max()) < 1e-5


def test_temperature_equals_the_softened_kl_times_its_square():
    teacher, student = pair()
    got = topk_kl(student, *kept(teacher, 40), temperature=2.0).mean()
    torch.testing.assert_close(got, 4 * full_kl(teacher / 2, student / 2), rtol=1e-4, atol=1e-5)


def test_rows_without_attention_to_the_image_leave_the_cosine():
    g = torch.Generator().manual_seed(0)
    teacher, student = torch.rand(2, 6, 9, generator=g), torch.rand(2, 6, 9, generator=g)
    teacher[:, :2] = 0
    expected = F.cosine_similarity(teacher[:, 2:], student[:, 2:], dim=-1).mean()
    torch.testing.assert_close(attention_cosine(teacher, student), expected)
    assert float(attention_cosine(torch.zeros(2, 6, 9), student)) == 1.0
