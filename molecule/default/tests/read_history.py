"""Call get_historical_features as a user does who trains a model; runs on a host with the trainer's credential.

The argument is {"features": [...], "symbol": [...], "event_timestamp": [...]}; the program prints a list of rows.
"""

import json
import os
import sys
from pathlib import Path

import pandas as pd
from feast import FeatureStore

request = json.loads(sys.argv[1])
store = FeatureStore(fs_yaml_file=Path(os.environ["CREDENTIALS_DIRECTORY"]) / "feature_store.yaml")
entities = pd.DataFrame(
    {"symbol": request["symbol"], "event_timestamp": pd.to_datetime(request["event_timestamp"], utc=True)}
)
rows = store.get_historical_features(entities, request["features"]).to_df().astype(object)
rows["event_timestamp"] = [instant.isoformat() for instant in pd.to_datetime(rows["event_timestamp"], utc=True)]
json.dump(rows.where(rows.notna(), None).to_dict("records"), sys.stdout)
