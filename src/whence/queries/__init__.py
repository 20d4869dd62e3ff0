"""What can be asked of a model: scalar functions of its parameters."""

from whence.queries.averaged import Averaged as Averaged
from whence.queries.parameters import Custom as Custom
from whence.queries.parameters import Parameter as Parameter
from whence.queries.query import Query as Query
from whence.queries.query import gradients as gradients
from whence.queries.query import values as values
from whence.queries.rows import Feature as Feature
from whence.queries.rows import Logit as Logit
from whence.queries.rows import Loss as Loss
from whence.queries.rows import Margin as Margin
from whence.queries.rows import Saliency as Saliency
