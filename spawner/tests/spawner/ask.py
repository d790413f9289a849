"""Asks the broker this and that, from inside the sandbox, and writes down what it answered."""
import base64
import http.client
import json
import os
import urllib.parse

url = urllib.parse.urlparse(os.environ["ARTEL_BROKER_URL"])
key = os.environ["ARTEL_BROKER_KEY"]
answers = {}


def ask(name, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    given = {"Authorization": "Bearer " + key} if headers is None else headers
    connection.request(method, path, body, given)
    response = connection.getresponse()
    answers[name] = [response.status, response.read().decode()]


ask("no key", "GET", "/v1/models", headers={})
ask("wrong key", "GET", "/v1/models", headers={"Authorization": "Bearer nonsense"})
ask("anthropic's header", "GET", "/v1/models", headers={"x-api-key": key})
ask("models", "GET", "/v1/models")
ask("elsewhere", "GET", "/v1/files")
ask("wrong method", "GET", "/v1/result")
ask("no json", "POST", "/v1/chat/completions", "hello")
ask("no messages", "POST", "/v1/chat/completions", "{}")
ask("too large", "POST", "/v1/progress", "x" * 300000)
ask("bad result", "POST", "/v1/result", '{"status": "great"}')
ask("no text", "POST", "/v1/progress", "{}")
question = {"model": "x", "messages": []}
lies = {
    "Authorization": "Bearer " + key,
    "X-Artel-Thread": "somebody/else",
    "X-Artel-Role": "architect",
}
ask("json", "POST", "/v1/chat/completions", json.dumps(question), lies)
ask("stream", "POST", "/v1/chat/completions", json.dumps(question | {"stream": True}))

proxy = {"Proxy-Authorization": "Basic " + base64.b64encode(b"job:" + key.encode()).decode()}
ask("proxy without key", "CONNECT", "example.org:443", headers={})
ask("not listed", "CONNECT", "example.org:443", headers=proxy)
ask("metadata", "CONNECT", "169.254.169.254:80", headers=proxy)
ask("loopback", "CONNECT", "localhost:22", headers=proxy)
ask("absolute form", "GET", "http://10.0.0.1:80/", headers=proxy)

for status in ["succeeded", "failed"]:
    report = {"status": status, "summary": status, "reason": "x"}
    ask("report " + status, "POST", "/v1/result", json.dumps(report))

with open("answers.json", "w") as file:
    json.dump(answers, file)
