"""The teacher's data: videos that its own sampler makes, kept as states and velocities that students learn from.

what is sampled   prompts, images, conditions
sampling          flow (velocities, scores, the sampler's steps), experts (the two transformers of Wan 2.2), collect
what is kept      store, atomic_files (with checksums), fingerprint
small things      seeding (everything drawn at random is drawn by name), devices
"""

from linvideo.trajectories.prompts import PromptEmbeddings, encode_prompts, read_prompts
from linvideo.trajectories.store import StateBatch, TrajectoryStore

__all__ = ["PromptEmbeddings", "StateBatch", "TrajectoryStore", "encode_prompts", "read_prompts"]
