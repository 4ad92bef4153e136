from __future__ import annotations

import numpy as np
import torch

from isthmus.models.recipes.common.ridge import affine_ridge, ridge


def test_ridge_finds_a_linear_map() -> None:
    rng = np.random.default_rng(0)
    x_NI, mixing_IO = rng.normal(size=(4000, 8)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    found_IO = ridge(x_NI.T @ x_NI, x_NI.T @ (x_NI @ mixing_IO), 0.01 * len(x_NI))
    np.testing.assert_allclose(found_IO, mixing_IO, rtol=0.02, atol=0.01)


def test_ridge_computes_in_double_precision() -> None:
    gram_II = np.array([[1, 1], [1, 1]], np.float32)
    np.testing.assert_allclose(ridge(gram_II, np.ones((2, 1), np.float32), 1e-9), np.full((2, 1), 0.5), rtol=1e-6)


def test_a_single_y_has_a_single_weight() -> None:
    np.testing.assert_allclose(ridge(np.eye(2), np.array([1.0, 2.0]), 3.0), [0.25, 0.5])


def test_affine_ridge_finds_weight_and_bias() -> None:
    torch.manual_seed(0)
    x_NI, weight_OI, bias_O = torch.randn(500, 8), torch.randn(5, 8), torch.randn(5)
    found_OI, found_O = affine_ridge(x_NI, x_NI @ weight_OI.T + bias_O, 1e-6)
    torch.testing.assert_close(found_OI, weight_OI, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found_O, bias_O, atol=1e-3, rtol=1e-3)


def test_the_strength_of_affine_ridge_is_relative_to_the_variance() -> None:
    torch.manual_seed(0)
    x_NI, y_NO = torch.randn(100, 4), torch.randn(100, 2)
    weight_OI, _ = affine_ridge(x_NI, y_NO, 0.5)
    scaled_OI, _ = affine_ridge(10 * x_NI, y_NO, 0.5)
    torch.testing.assert_close(10 * scaled_OI, weight_OI)
