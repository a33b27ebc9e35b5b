"""Losses: each forward returns a number and residuals, its backward turns the number's cotangent into that of the predictions."""
from .cross_entropy import bits, cross_entropy_backward, cross_entropy_forward
from .ctc import ctc_backward, ctc_beam_decode, ctc_forward, ctc_greedy_decode, phoneme_error_rate
from .logistic_mixture import logistic_mixture_backward, logistic_mixture_forward, logistic_mixture_sample

__all__ = ["bits", "cross_entropy_backward", "cross_entropy_forward", "ctc_backward", "ctc_beam_decode", "ctc_forward", "ctc_greedy_decode",
           "logistic_mixture_backward", "logistic_mixture_forward", "logistic_mixture_sample", "phoneme_error_rate"]
