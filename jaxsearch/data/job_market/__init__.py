"""`job_market`: a generated job and people search with grades and impressions, from facts that the package carries."""

from jaxsearch.data.job_market.job_market_dataset_builder import PRECEDENTS as PRECEDENTS
from jaxsearch.data.job_market.job_market_dataset_builder import VERSIONS as VERSIONS
from jaxsearch.data.job_market.job_market_dataset_builder import Builder as Builder
from jaxsearch.data.job_market.tables import Tables as Tables
from jaxsearch.data.job_market.tables import load_tables as load_tables
from jaxsearch.data.job_market.tables import prepare as prepare
