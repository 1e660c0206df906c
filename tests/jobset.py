"""What a JobSet may hold, of the fields that launch/gke.sh writes.

Names, types, choices and required fields after the API v1alpha2 of
github.com/kubernetes-sigs/jobset v0.12.0 and the Job and Pod of Kubernetes that
it embeds; any other field is refused, as `kubectl apply` does.
"""

TEXT = {'type': 'string'}
COUNT = {'type': 'integer', 'minimum': 0}
FLAG = {'type': 'boolean'}
TEXTS = {'type': 'object', 'additionalProperties': TEXT}
QUANTITIES = {
  'type': 'object',
  'additionalProperties': {
    'anyOf': [COUNT, {'type': 'string', 'pattern': r'^\d+(\.\d+)?([KMGT]i?)?$'}]
  },
}
NAME = {'type': 'string', 'pattern': r'^[a-z]([-a-z0-9]*[a-z0-9])?$'}


def one_of(*choices):
  return {'type': 'string', 'enum': list(choices)}


def many(item):
  return {'type': 'array', 'items': item, 'minItems': 1}


def fields(required='', **properties):
  """An object of these fields and no other."""
  return {
    'type': 'object',
    'required': required.split(),
    'additionalProperties': False,
    'properties': properties,
  }


CONTAINER = fields(
  'name',
  name=NAME,
  image=TEXT,
  command=many(TEXT),
  args=many(TEXT),
  securityContext=fields(privileged=FLAG, runAsUser=COUNT),
  resources=fields(requests=QUANTITIES, limits=QUANTITIES),
  volumeMounts=many(fields('name mountPath', name=NAME, mountPath=TEXT)),
)
POD = fields(
  'containers',
  restartPolicy=one_of('Never', 'OnFailure'),
  terminationGracePeriodSeconds=COUNT,
  hostNetwork=FLAG,
  dnsPolicy=one_of('ClusterFirst', 'ClusterFirstWithHostNet', 'Default'),
  nodeSelector=TEXTS,
  tolerations=many(fields(key=TEXT, operator=one_of('Exists', 'Equal'))),
  containers=many(CONTAINER),
  volumes=many(
    fields(
      'name',
      name=NAME,
      persistentVolumeClaim=fields('claimName', claimName=TEXT),
      emptyDir=fields(medium=one_of('', 'Memory')),
    )
  ),
)
EXIT_CODES = fields(
  'operator values',
  containerName=TEXT,
  operator=one_of('In', 'NotIn'),
  values=many({'type': 'integer', 'minimum': 1, 'maximum': 255}),
)
CONDITION = fields('type', type=TEXT, status=one_of('True', 'False', 'Unknown'))
JOB = fields(
  'template',
  parallelism=COUNT,
  completions=COUNT,
  completionMode=one_of('Indexed', 'NonIndexed'),
  backoffLimit=COUNT,
  podFailurePolicy=fields(
    'rules',
    rules=many(
      fields(
        'action',
        action=one_of('FailJob', 'FailIndex', 'Ignore', 'Count'),
        onExitCodes=EXIT_CODES,
        onPodConditions=many(CONDITION),
      )
    ),
  ),
  template=fields('spec', spec=POD),
)
FAILURE_RULE = fields(
  'name action',
  name=TEXT,
  action=one_of(
    'FailJobSet',
    'RestartJobSet',
    'RestartJobSetAndIgnoreMaxRestarts',
    'RestartJob',
    'RestartJobAndIgnoreMaxRestarts',
  ),
  onJobFailureReasons=many(
    one_of(
      'BackoffLimitExceeded',
      'DeadlineExceeded',
      'FailedIndexes',
      'MaxFailedIndexesExceeded',
      'PodFailurePolicy',
    )
  ),
  onJobFailureMessagePatterns=many(TEXT),
)
SCHEMA = fields(
  'apiVersion kind metadata spec',
  apiVersion=one_of('jobset.x-k8s.io/v1alpha2'),
  kind=one_of('JobSet'),
  metadata=fields(
    'name', name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS
  ),
  spec=fields(
    'replicatedJobs',
    failurePolicy=fields(maxRestarts=COUNT, rules=many(FAILURE_RULE)),
    replicatedJobs=many(
      fields(
        'name template',
        name=NAME,
        replicas=COUNT,
        template=fields('spec', spec=JOB),
      )
    ),
  ),
)
