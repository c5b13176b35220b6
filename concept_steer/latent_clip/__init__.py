"""Latent-CLIP (Becker et al. 2503.08455): judge, rank and search pictures in the latent, without decoding."""

from .checkpoint import convert, load_latent_clip, read_checkpoint
from .guard import LatentDetector, LatentGuard, Limits, calibrate, make_guard
from .guard_report import GuardReport
from .guarded import Guarded, LatentCheck, draw_guarded
from .model import CONFIGS, ClipConfig, LatentClip, LatentClipModel
from .noise import Descent, Reward, Sampler, optimise_noise
from .noise_result import NoiseResult, Snapshot, gaussian
from .ranking import Ranking, order_latents, rank
from .rewards import absence_reward, own_copy, text_reward
from .scoring import Scores, class_vectors, classify, score, score_noisy
from .search import Hit, Index, index, read_latents, save_latents, search
from .spaces import SPACES, LatentSpace, check_space, space, space_of
from .templates import PUBLISHED, SIMPLE
from .tokenizer import ClipTokenizer, find_tokenizer, read_tokenizer

__all__ = [
    "CONFIGS",
    "PUBLISHED",
    "SIMPLE",
    "SPACES",
    "ClipConfig",
    "ClipTokenizer",
    "Descent",
    "GuardReport",
    "Guarded",
    "Hit",
    "Index",
    "LatentCheck",
    "LatentClip",
    "LatentClipModel",
    "LatentDetector",
    "LatentGuard",
    "LatentSpace",
    "Limits",
    "NoiseResult",
    "Ranking",
    "Reward",
    "Sampler",
    "Scores",
    "Snapshot",
    "absence_reward",
    "calibrate",
    "check_space",
    "class_vectors",
    "classify",
    "convert",
    "draw_guarded",
    "find_tokenizer",
    "gaussian",
    "index",
    "load_latent_clip",
    "make_guard",
    "optimise_noise",
    "order_latents",
    "own_copy",
    "rank",
    "read_checkpoint",
    "read_latents",
    "read_tokenizer",
    "save_latents",
    "score",
    "score_noisy",
    "search",
    "space",
    "space_of",
    "text_reward",
]
