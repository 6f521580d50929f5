"""Where all queries look: the Prometheus and the run that the viewer chooses."""

from grafana_foundation_sdk.models.dashboard import DataSourceRef

RUN = 'run="$run"'
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
