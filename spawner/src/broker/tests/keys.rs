//! The key lives as long as its job, at every endpoint.

use super::*;

#[tokio::test]
async fn the_key_of_a_job_that_has_ended_opens_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let ended = broker(folder.path(), host).await;
    let (old, gone) = (ended.key().to_owned(), ended.socket().to_owned());
    drop(ended);
    assert!(UnixStream::connect(&gone).await.is_err(), "nobody listens");

    // The next attempt of the same task has a key of its own.
    let again = tempfile::tempdir().unwrap();
    let next = broker(again.path(), host).await;
    assert_ne!(next.key(), old);
    let login = login(&old);
    for (method, path) in [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages?beta=true"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/models"),
        ("POST", "/v1/progress"),
        ("POST", "/v1/result"),
        ("GET", "/v1/anything"),
    ] {
        for header in [
            format!("Authorization: Bearer {old}"),
            format!("x-api-key: {old}"),
            format!("Proxy-Authorization: Basic {login}"),
        ] {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\n{header}\r\nContent-Length: 2\r\n\r\n{{}}"
            );
            let (status, _, body) = exchange(next.socket(), &request).await;
            assert_eq!(status, 401, "{method} {path} {header}: {body}");
            let body: Value = serde_json::from_str(&body).unwrap();
            let anthropic = path.starts_with("/v1/messages");
            assert_eq!(body["type"] == "error", anthropic, "{path}: {body}");
            let kind = if anthropic {
                "authentication_error"
            } else {
                "unauthorized"
            };
            assert_eq!(body["error"]["type"], kind, "{path}: {body}");
        }
    }
    for line in [
        "CONNECT site.example:443 HTTP/1.1",
        "GET http://site.example/ HTTP/1.1",
    ] {
        for header in [
            format!("Proxy-Authorization: Basic {login}"),
            // The proxy's key is in the proxy's header.
            format!("Authorization: Bearer {}", next.key()),
        ] {
            let request = format!("{line}\r\nHost: b\r\nConnection: close\r\n{header}\r\n\r\n");
            let (status, _, body) = exchange(next.socket(), &request).await;
            assert_eq!(status, 407, "{line} {header}: {body}");
        }
    }
    assert!(next.said().is_none());
    assert_eq!(next.usage(), Usage::default());
    let reached = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(reached.is_err(), "no host was reached");
}

#[tokio::test]
async fn a_connection_that_was_open_when_its_job_ended_is_of_no_use() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path(), "127.0.0.1:9".parse().unwrap()).await;
    let request = format!(
        "GET /v1/models HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer {}\r\n\r\n",
        broker.key()
    );
    let mut kept = ask(&broker, request.clone()).await;
    let mut line = String::new();
    kept.read_line(&mut line).await.unwrap();
    assert_eq!(line, "HTTP/1.1 200 OK\r\n");
    drop(broker);
    // Written or not, nothing comes back any more.
    let _ = kept.get_mut().write_all(request.as_bytes()).await;
    let mut rest = String::new();
    let read = kept.read_to_string(&mut rest);
    let _ = tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("the connection ends");
    assert!(!rest.contains("HTTP/1.1"), "{rest}");
}
