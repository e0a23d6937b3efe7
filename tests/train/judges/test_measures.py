import math

import pytest
import torch

from wanmoe.train.judges.measures import (
    accuracy,
    confusion,
    interval,
    pad_tips,
    pck,
    tip_errors,
    true_tips,
)

NAN = math.nan


def test_accuracy_takes_each_of_two_equal_labels() -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5], [0.2, 0.8, 0]])
    assert accuracy(torch.tensor([0, 1, 2, 0]), labels) == 0.75
    assert math.isnan(accuracy(torch.zeros(0, dtype=torch.long), labels[:0]))


def test_confusion_has_labels_in_rows_and_judgements_in_columns() -> None:
    labels = torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0], [0.25, 0.75]])
    table = confusion(torch.tensor([1, 1, 0, 1]), labels)
    assert table.tolist() == [[0, 1.25], [1, 1.75]] and table.sum() == 4


def test_the_interval_is_wilsons() -> None:
    low, high = interval(45 / 50, 50)
    assert (round(low, 3), round(high, 3)) == (0.786, 0.957)
    assert interval(1.0, 48)[1] == pytest.approx(1.0) and interval(NAN, 0) == (0.0, 1.0)


def test_a_latent_frame_stands_for_the_last_of_its_frames() -> None:
    tips = [{"frame": frame, "x": 10.0 * frame, "y": 1.0} for frame in range(9) if frame != 4]
    truth = true_tips({"tips": tips}, 3)
    assert truth.shape == (3, 1, 2) and truth[[0, 2]].tolist() == [[[0, 1]], [[80, 1]]]
    assert truth[1].isnan().all()
    assert true_tips({}, 2).isnan().all() and true_tips({"tips": None}, 2).shape == (2, 1, 2)


def test_two_tips_of_a_frame_are_kept_and_padded() -> None:
    tips = [{"frame": 0, "x": 1, "y": 2}, {"frame": 0, "x": 3, "y": 4}, {"frame": 4, "x": 5, "y": 6}]
    two = true_tips({"tips": tips}, 2)
    assert two.shape == (2, 2, 2) and two[0].tolist() == [[1, 2], [3, 4]] and two[1, 1].isnan().all()
    both = pad_tips([two, true_tips({"tips": tips[2:]}, 2)])
    assert both.shape == (2, 2, 2, 2) and both[1, 1, 0].tolist() == [5, 6] and both[1, :, 1].isnan().all()


def test_pck_counts_missed_tips_as_wrong_and_leaves_out_frames_without_a_mark() -> None:
    truth = torch.tensor([[[[10.0, 10.0]], [[10.0, 10.0]], [[10.0, 10.0]], [[NAN, NAN]]]])
    predicted = torch.tensor([[[13.0, 14.0, 0.9], [10.0, 10.0, 0.01], [30.0, 10.0, 0.9], [0.0, 0.0, 0.9]]])
    assert tip_errors(predicted, truth).tolist() == [5.0, math.inf, 20.0]
    shares = [pck(predicted, truth, radius) for radius in (4.9, 5, 19, 20, 1e6)]
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert math.isnan(pck(predicted[:, 3:], truth[:, 3:], 8))


def test_the_nearest_of_several_tips_counts_and_nan_is_wrong() -> None:
    truth = torch.tensor([[[[0.0, 0.0], [50.0, 50.0]], [[0.0, 0.0], [NAN, NAN]]]])
    predicted = torch.tensor([[[51.0, 50.0, 1.0], [NAN, 0.0, 1.0]]])
    assert tip_errors(predicted, truth).tolist() == [1.0, math.inf]
    assert pck(predicted, truth, 8) == 0.5
