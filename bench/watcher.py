"""Looks at a page once a second as a browser does, and at /metrics as a Prometheus of short intervals: `watcher.py URL`."""

import json
import sys
import time
import urllib.parse
import urllib.request

url, version, last = sys.argv[1], "", -1.0
while True:
    query = urllib.parse.urlencode({"since": version, "time": last})
    news = json.load(urllib.request.urlopen(f"{url}picture.json?{query}"))
    version, last = news["version"], news["samples"][-1][0] if news["samples"] else last
    urllib.request.urlopen(f"{url}metrics").read()
    time.sleep(1.0)
