"""The training data: videos that the teacher's own sampler makes, stored as states and velocities for the student.

inputs     prompts, images, conditions
sampling   flow (velocities, scores, the sampler's steps), experts (the two transformers of Wan 2.2), collect
storage    store, atomic_files (with checksums), fingerprint
helpers    seeding (every random draw has a name), devices
"""

from linvideo.trajectories.prompts import PromptEmbeddings, encode_prompts, read_prompts
from linvideo.trajectories.store import StateBatch, TrajectoryStore

__all__ = ["PromptEmbeddings", "StateBatch", "TrajectoryStore", "encode_prompts", "read_prompts"]
