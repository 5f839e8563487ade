"""Networks as pairs of pure functions, and the layers they are made of."""

from bsjax.conv import conv as conv
from bsjax.conv import max_pool as max_pool
from bsjax.conv import transposed_conv as transposed_conv
from bsjax.models.autoencoder import autoencoder as autoencoder
from bsjax.models.keskar import deep as deep
from bsjax.models.keskar import f1 as f1
from bsjax.models.keskar import f2 as f2
from bsjax.models.keskar import shallow as shallow
from bsjax.models.layers import Conv as Conv
from bsjax.models.layers import Dropout as Dropout
from bsjax.models.lstm import BILLION_WORD_LSTMS as BILLION_WORD_LSTMS
from bsjax.models.lstm import lstm as lstm
from bsjax.models.model import Model as Model
from bsjax.models.networks import cnn as cnn
from bsjax.models.networks import lenet as lenet
from bsjax.models.networks import mlp as mlp
from bsjax.models.networks import simple_cnn as simple_cnn
from bsjax.models.norm import BatchNorm as BatchNorm
from bsjax.models.norm import BatchNormMode as BatchNormMode
from bsjax.models.resnet import cifar_resnet as cifar_resnet
from bsjax.models.resnet import imagenet_resnet as imagenet_resnet
from bsjax.models.transformer import TRANSFORMERS as TRANSFORMERS
from bsjax.models.transformer import language_model as language_model
from bsjax.models.transformer import vit as vit
from bsjax.models.transformer import vit_s16 as vit_s16
from bsjax.models.vgg import vgg11 as vgg11
