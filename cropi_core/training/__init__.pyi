from .features import FeatureCollector as FeatureCollector
from .files import FeaturePlan as FeaturePlan
from .files import StageFiles as StageFiles
from .launch import launched as launched
from .stage import train as train
