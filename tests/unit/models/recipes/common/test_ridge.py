from __future__ import annotations

import numpy as np
import torch

from isthmus.models.recipes.common.ridge import affine_ridge, ridge


def test_ridge_finds_a_linear_map() -> None:
    rng = np.random.default_rng(0)
    x_NI, mixing_OI = rng.normal(size=(4000, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    y_NO = x_NI @ mixing_OI.T
    found_OI = ridge(torch.from_numpy(x_NI.T @ x_NI), torch.from_numpy(x_NI.T @ y_NO), 0.01 * len(x_NI))
    np.testing.assert_allclose(found_OI, mixing_OI, rtol=0.02, atol=0.01)


def test_ridge_is_the_closed_form_in_double_precision() -> None:
    rng = np.random.default_rng(1)
    x_NI, y_NO = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(50, 3)).astype(np.float32)
    gram_II, moment_IO = x_NI.T @ x_NI, x_NI.T @ y_NO
    wanted_OI = np.linalg.solve(gram_II.astype(np.float64) + 5 * np.eye(8), moment_IO).T.astype(np.float32)
    found_OI = ridge(torch.from_numpy(gram_II), torch.from_numpy(moment_IO), 5.0)
    assert found_OI.dtype == torch.float32
    np.testing.assert_allclose(found_OI, wanted_OI, rtol=1e-6)


def test_a_large_penalty_shrinks_the_weight() -> None:
    gram_II, moment_IO = torch.eye(2), torch.ones(2, 1)
    torch.testing.assert_close(ridge(gram_II, moment_IO, 3.0), torch.full((1, 2), 0.25))


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
