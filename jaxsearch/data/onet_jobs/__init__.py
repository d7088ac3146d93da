"""`onet_jobs`: real occupations as documents and real job titles as queries, from the O*NET text release (see
README.md).
"""

from jaxsearch.data.onet_jobs.onet_jobs_dataset_builder import Builder as Builder
from jaxsearch.data.onet_jobs.release import ReleaseError as ReleaseError
from jaxsearch.data.onet_jobs.rerank_lists import RerankListError as RerankListError
from jaxsearch.data.onet_jobs.rerank_lists import load_rerank_lists as load_rerank_lists
from jaxsearch.data.onet_jobs.tables import Tables as Tables
from jaxsearch.data.onet_jobs.tables import load_tables as load_tables
from jaxsearch.data.onet_jobs.tables import prepare as prepare
