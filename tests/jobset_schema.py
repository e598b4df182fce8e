# SPDX-License-Identifier: Apache-2.0
"""A JSON schema of the JobSet that `launch/gke.yaml` may be.

Our own words for the fields that we use, after jobset.x-k8s.io/v1alpha2 and
Kubernetes' batch/v1 and v1. Any other field is refused: it is a misspelling, or
a field to add here with its type.
"""

from typing import Any

TEXT = {'type': 'string', 'minLength': 1}
COUNT = {'type': 'integer', 'minimum': 1}
NAME = {'type': 'string', 'pattern': '^[a-z]([-a-z0-9]*[a-z0-9])?$'}
TEXTS = {'type': 'object', 'additionalProperties': {'type': 'string'}}


def fields(**properties: Any) -> dict[str, Any]:
  """Returns an object with these fields and no other.

  Args:
    **properties: schemas by name; a name that ends in `_` may be absent.
  """
  return {
    'type': 'object',
    'additionalProperties': False,
    'properties': {name.rstrip('_'): x for name, x in properties.items()},
    'required': [name for name in properties if not name.endswith('_')],
  }


def list_of(items: Any) -> dict[str, Any]:
  return {'type': 'array', 'items': items, 'minItems': 1}


def one_of(*values: str) -> dict[str, Any]:
  return {'enum': list(values)}


_CONTAINER = fields(
  name=NAME,
  image=TEXT,
  command=list_of(TEXT),
  args=list_of(TEXT),
  env_=list_of(fields(name=TEXT, value=TEXT)),
  resources=fields(limits=fields(**{'google.com/tpu': COUNT})),
  volumeMounts_=list_of(
    fields(name=NAME, mountPath=TEXT, readOnly_={'type': 'boolean'})
  ),
)

_POD = fields(
  metadata_=fields(annotations_=TEXTS, labels_=TEXTS),
  spec=fields(
    # Of a Job with a podFailurePolicy nothing else is allowed.
    restartPolicy=one_of('Never'),
    serviceAccountName_=NAME,
    terminationGracePeriodSeconds_=COUNT,
    nodeSelector=TEXTS,
    containers=list_of(_CONTAINER),
    volumes_=list_of(
      fields(name=NAME, csi=fields(driver=TEXT, volumeAttributes=TEXTS))
    ),
  ),
)

_POD_FAILURE_RULE = {
  'oneOf': [
    fields(
      action=one_of('FailJob', 'FailIndex', 'Ignore', 'Count'),
      onExitCodes=fields(
        containerName_=NAME,
        operator=one_of('In', 'NotIn'),
        values=list_of({'type': 'integer', 'minimum': 0, 'maximum': 255}),
      ),
    ),
    fields(
      action=one_of('FailJob', 'FailIndex', 'Ignore', 'Count'),
      onPodConditions=list_of(
        fields(type=TEXT, status_=one_of('True', 'False', 'Unknown'))
      ),
    ),
  ]
}

_JOB = fields(
  parallelism=COUNT,
  completions=COUNT,
  completionMode_=one_of('Indexed', 'NonIndexed'),
  backoffLimit={'type': 'integer', 'minimum': 0},
  podFailurePolicy_=fields(rules=list_of(_POD_FAILURE_RULE)),
  template=_POD,
)

_JOBSET_RULE = fields(
  name_={
    'type': 'string',
    'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$',
  },
  action=one_of(
    'FailJobSet',
    'RestartJobSet',
    'RestartJobSetAndIgnoreMaxRestarts',
    'RestartJob',
    'RestartJobAndIgnoreMaxRestarts',
  ),
  onJobFailureReasons_=list_of(
    one_of(
      'BackoffLimitExceeded',
      'DeadlineExceeded',
      'FailedIndexes',
      'MaxFailedIndexesExceeded',
      'PodFailurePolicy',
    )
  ),
  targetReplicatedJobs_=list_of(NAME),
)

JOBSET = fields(
  apiVersion=one_of('jobset.x-k8s.io/v1alpha2'),
  kind=one_of('JobSet'),
  metadata=fields(name=NAME, annotations_=TEXTS, labels_=TEXTS),
  spec=fields(
    failurePolicy=fields(
      maxRestarts={'type': 'integer', 'minimum': 0},
      rules=list_of(_JOBSET_RULE),
    ),
    replicatedJobs=list_of(
      fields(name=NAME, replicas=COUNT, template=fields(spec=_JOB))
    ),
  ),
)
