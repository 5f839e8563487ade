"""Networks as pairs of pure functions, and the convolution and pool they are made of."""

from bsjax.conv import conv as conv
from bsjax.conv import max_pool as max_pool
from bsjax.models.lstm import BILLION_WORD_LSTMS as BILLION_WORD_LSTMS
from bsjax.models.lstm import lstm as lstm
from bsjax.models.model import Model as Model
from bsjax.models.networks import BatchNorm as BatchNorm
from bsjax.models.networks import Conv as Conv
from bsjax.models.networks import cnn as cnn
from bsjax.models.networks import mlp as mlp
from bsjax.models.transformer import TRANSFORMERS as TRANSFORMERS
from bsjax.models.transformer import language_model as language_model
from bsjax.models.transformer import vit as vit
from bsjax.models.transformer import vit_s16 as vit_s16
