"""Queries: the scalar functions of a model that influence is computed on."""

from backtrail.queries.averaged import Averaged as Averaged
from backtrail.queries.parameters import Custom as Custom
from backtrail.queries.parameters import Parameter as Parameter
from backtrail.queries.query import Part as Part
from backtrail.queries.query import Query as Query
from backtrail.queries.query import gradients as gradients
from backtrail.queries.query import values as values
from backtrail.queries.rows import Feature as Feature
from backtrail.queries.rows import Logit as Logit
from backtrail.queries.rows import Loss as Loss
from backtrail.queries.rows import Margin as Margin
from backtrail.queries.rows import Saliency as Saliency
