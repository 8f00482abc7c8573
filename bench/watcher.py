"""Looks at a page once a second as a browser does, and at /metrics as often as deploy/prometheus has it: `watcher.py URL`."""

import json
import sys
import time
import urllib.parse
import urllib.request

SCRAPE_SECONDS = 15.0

url, version, last, scraped_at = sys.argv[1], "", -1.0, 0.0
while True:
    query = urllib.parse.urlencode({"since": version, "time": last})
    news = json.load(urllib.request.urlopen(f"{url}picture.json?{query}"))
    version, last = news["version"], news["samples"][-1][0] if news["samples"] else last
    if time.monotonic() - scraped_at > SCRAPE_SECONDS:
        urllib.request.urlopen(f"{url}metrics").read()
        scraped_at = time.monotonic()
    time.sleep(1.0)
