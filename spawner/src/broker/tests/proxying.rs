//! The way to hosts: which names and addresses are reached, and how often a name is asked for.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

async fn connect(broker: &Broker, place: &str) -> (u16, String) {
    let request = format!(
        "CONNECT {place} HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\nProxy-Authorization: Basic {}\r\n\r\n",
        login(broker.key())
    );
    let (status, _, body) = exchange(broker.socket(), &request).await;
    (status, body)
}

async fn get(broker: &Broker, url: &str) -> (u16, String) {
    let request = format!(
        "GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nProxy-Authorization: Basic {}\r\n\r\n",
        login(broker.key())
    );
    let (status, _, body) = exchange(broker.socket(), &request).await;
    (status, body)
}

/// A request for a tunnel to the host that the tests allow.
fn tunnel_to_site(broker: &Broker) -> String {
    let login = login(broker.key());
    format!(
        "CONNECT site.example:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {login}\r\n\r\n"
    )
}

#[tokio::test]
async fn a_listed_name_that_stands_for_an_inner_address_is_refused_both_ways() {
    for address in [
        "127.0.0.1:80",
        "10.1.2.3:80",
        "192.168.0.1:80",
        "169.254.169.254:80",
        "100.100.100.200:80",
        "0.0.0.0:80",
        "[::1]:80",
        "[fd00:ec2::254]:80",
        "[fe80::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[::ffff:169.254.169.254]:80",
        "[64:ff9b::a00:1]:80",
    ] {
        let address: SocketAddr = address.parse().unwrap();
        // A public one before it does not help.
        let public: SocketAddr = "93.184.216.34:80".parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let resolver = resolver(move |_| vec![public, address], allow::forbidden);
        let broker = broker_with(folder.path(), &Arc::default(), resolver).await;
        for (status, body) in [
            connect(&broker, "site.example:443").await,
            get(&broker, "http://site.example/").await,
        ] {
            assert_eq!(status, 403, "{address}: {body}");
            assert!(body.contains("it stands for"), "{address}: {body}");
        }
    }
}

#[tokio::test]
async fn addresses_and_ports_that_are_not_listed_are_refused_however_they_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let looked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&looked);
    let resolver = resolver(
        move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            Vec::new()
        },
        allow::forbidden,
    );
    let broker = broker_with(folder.path(), &Arc::default(), resolver).await;
    for place in [
        "127.0.0.1:443",
        "[::1]:443",
        "[::ffff:127.0.0.1]:443",
        "[::ffff:7f00:1]:443",
        "2130706433:443",
        "0x7f.1:443",
        "localhost:443",
        "site.example:22",
        "site.example:8443",
        "site.example.evil.example:443",
        "evil.example:443",
        "other.example:80",
    ] {
        let (status, body) = connect(&broker, place).await;
        assert_eq!(status, 403, "{place}: {body}");
        assert!(body.contains("not on the job's list"), "{place}: {body}");
    }
    for url in [
        "http://127.0.0.1/",
        "http://[::ffff:169.254.169.254]/latest/meta-data/",
        "http://site.example:8080/",
        "http://site.example@evil.example/",
        "http://evil.example/?site.example",
        "http://other.example/",
    ] {
        let (status, body) = get(&broker, url).await;
        assert_eq!(status, 403, "{url}: {body}");
    }
    assert_eq!(looked.load(Ordering::SeqCst), 0, "no name was asked for");
    // What would have to be opened here is not: that is what tunnels are for.
    let (status, body) = get(&broker, "https://site.example:443/").await;
    assert!(status >= 400, "{status} {body}");
}

#[tokio::test]
async fn a_name_is_asked_for_once_and_what_was_looked_at_is_what_is_reached() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let good = listener.local_addr().unwrap();
    // A name that stands for another, inner address the moment after it was looked at.
    let elsewhere = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let bad = elsewhere.local_addr().unwrap();
    let looked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&looked);
    let resolver = resolver(
        move |_| match count.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => vec![good],
            _ => vec![bad],
        },
        |address| (address.to_string() == "127.0.0.2").then_some("this one is inside"),
    );
    let broker = broker_with(folder.path(), &Arc::default(), resolver).await;
    let url = "http://site.example/start";
    let request = format!(
        "GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nProxy-Authorization: Basic {}\r\n\r\n",
        login(broker.key())
    );
    let asked = exchange(broker.socket(), &request);
    let answered = async {
        let (mut host, _) = listener.accept().await.unwrap();
        let mut seen = vec![0; 4096];
        let _ = host.read(&mut seen).await.unwrap();
        host.write_all(b"HTTP/1.1 302 Found\r\nLocation: http://site.example/inner\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
    };
    let ((status, head, _), ()) = tokio::join!(asked, answered);
    assert_eq!(status, 302, "a redirect is the client's to follow");
    assert!(
        head.contains("location: http://site.example/inner"),
        "{head}"
    );
    assert_eq!(looked.load(Ordering::SeqCst), 1);
    // Following it, the name is looked up and looked at again.
    let (status, body) = get(&broker, "http://site.example/inner").await;
    assert_eq!(status, 403, "{body}");
    assert!(body.contains("this one is inside"), "{body}");
    assert_eq!(looked.load(Ordering::SeqCst), 2);
    let reached = tokio::time::timeout(Duration::from_millis(50), elsewhere.accept()).await;
    assert!(reached.is_err(), "the inner host was not reached");
}

#[tokio::test]
async fn tunnels_are_bounded_and_their_traffic_is_a_sign_of_life() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = broker(folder.path(), listener.local_addr().unwrap()).await;
    let request = tunnel_to_site(&broker);
    let mut open = Vec::new();
    for n in 0..64 {
        let mut tunnel = ask(&broker, request.clone()).await;
        let mut line = String::new();
        tunnel.read_line(&mut line).await.unwrap();
        assert!(line.starts_with("HTTP/1.1 200"), "{n}: {line}");
        tunnel.read_line(&mut line).await.unwrap();
        open.push((tunnel, listener.accept().await.unwrap().0));
    }
    let (status, body) = connect(&broker, "site.example:443").await;
    assert_eq!(status, 429, "{body}");
    assert!(body.contains("64 tunnels"), "{body}");

    // What the host sends is seen although the worker asks for nothing.
    let (mut tunnel, mut host) = open.pop().unwrap();
    let activity = broker.inner.events.activity().clone();
    let quiet = async {
        while activity.silence() < Duration::from_millis(50) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), quiet)
        .await
        .unwrap();
    let since = std::time::Instant::now();
    host.write_all(b"data").await.unwrap();
    let mut four = vec![0; 4];
    tunnel.read_exact(&mut four).await.unwrap();
    while four != b"data" {
        // The rest of the head of the answer to CONNECT.
        four.remove(0);
        let mut next = [0];
        tunnel.read_exact(&mut next).await.unwrap();
        four.extend(next);
    }
    // Without a sign it would be 50 ms more.
    assert!(activity.silence() <= since.elapsed() + Duration::from_millis(10));
    // And one that ended makes room.
    drop((tunnel, host));
    let again = async {
        loop {
            let mut tunnel = ask(&broker, request.clone()).await;
            let mut line = String::new();
            tunnel.read_line(&mut line).await.unwrap();
            if line.starts_with("HTTP/1.1 200") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again)
        .await
        .unwrap();
}

/// Reads the head of what comes, in lower case.
async fn head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut seen = Vec::new();
    let read = async {
        while !seen.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => seen.push(byte),
                Err(_) => break,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("a head comes and ends");
    String::from_utf8(seen).unwrap().to_lowercase()
}

#[tokio::test]
async fn a_request_whose_length_is_said_twice_is_passed_on_with_one() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = broker(folder.path(), listener.local_addr().unwrap()).await;
    let login = login(broker.key());
    // What one reader takes for a body is another request for the next one.
    let hidden = "GET http://site.example/hidden HTTP/1.1\r\nHost: x\r\n\r\n";
    for lengths in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\nConnection: content-length",
        "Content-Length: 5\r\nContent-Length: 50",
        "Transfer-Encoding: identity, chunked\r\nContent-Length: 0",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: xchunked\r\nContent-Length: 5",
        "Content-Length: +5",
        "Content-Length: 5, 50",
    ] {
        let request = format!(
            "POST http://site.example/first HTTP/1.1\r\nHost: x\r\n{lengths}\r\nProxy-Authorization: Basic {login}\r\n\r\n0\r\n\r\n{hidden}"
        );
        let mut asked = ask(&broker, request).await;
        let host = async {
            let (mut host, _) = listener.accept().await.unwrap();
            let seen = head(&mut host).await;
            host.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .await
                .unwrap();
            seen
        };
        // It is refused here, or it arrives with one length.
        tokio::select! {
            seen = host => {
                assert!(seen.starts_with("post /first "), "{lengths}: {seen}");
                let said = ["content-length:", "transfer-encoding:"].map(|name| seen.matches(name).count());
                assert!(said.iter().sum::<usize>() <= 1, "{lengths}: {seen}");
                let answer = head(&mut asked).await;
                assert!(answer.starts_with("http/1.1 200"), "{lengths}: {answer}");
            }
            answer = head(&mut asked) => {
                assert!(answer.is_empty() || answer.starts_with("http/1.1 4"), "{lengths}: {answer}");
            }
        }
        // What was hidden has no key of its own, and goes nowhere.
        let next = head(&mut asked).await;
        assert!(!next.starts_with("http/1.1 200"), "{lengths}: {next}");
    }
}

#[tokio::test]
async fn a_connection_is_not_turned_into_another_by_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = broker(folder.path(), listener.local_addr().unwrap()).await;
    let login = login(broker.key());
    let request = format!(
        "GET http://site.example/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhl\r\nProxy-Authorization: Basic {login}\r\n\r\n"
    );
    let mut asked = ask(&broker, request).await;
    let (mut host, _) = listener.accept().await.unwrap();
    let seen = head(&mut host).await;
    assert!(!seen.contains("upgrade"), "{seen}");
    // A host that does it nevertheless.
    host.write_all(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    )
    .await
    .unwrap();
    let answer = head(&mut asked).await;
    assert!(!answer.starts_with("http/1.1 101"), "{answer}");
}

/// A broker with so much patience for an answer and little for silence, and a host.
async fn impatient(folder: &Path, answer_within: Duration) -> (Broker, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let mut resolver = resolver(move |_| vec![host], |_| None);
    resolver.answer_within = answer_within;
    resolver.linger = Duration::from_millis(300);
    (
        broker_with(folder, &Arc::default(), resolver).await,
        listener,
    )
}

#[tokio::test]
async fn a_host_that_does_not_come_to_an_answer_is_given_up() {
    for (goes_on, wait, status, words) in [
        // Nothing but the beginning of a head.
        ("", Duration::from_millis(10), 504, "no answer within"),
        ("x", Duration::from_millis(10), 504, "no answer within"),
        // And one without an end.
        ("x", Duration::ZERO, 502, "gave no answer"),
        ("x-more: of it\r\n", Duration::ZERO, 502, "gave no answer"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        // What ends by its length has all the time that a busy machine takes.
        let patience = if wait.is_zero() { 60_000 } else { 300 };
        let (broker, listener) = impatient(folder.path(), Duration::from_millis(patience)).await;
        let asked = get(&broker, "http://site.example/");
        let answers = async {
            let (mut host, _) = listener.accept().await.unwrap();
            let _ = head(&mut host).await;
            let begins = if goes_on == "x" {
                "HTTP/1.1 200 OK\r\nx: "
            } else {
                "HTTP/1.1 200 OK\r\n"
            };
            host.write_all(begins.as_bytes()).await.unwrap();
            let many = if wait.is_zero() { 16 * 1024 } else { 1 };
            // Until it is given up and its connection closed.
            while host
                .write_all(goes_on.repeat(many).as_bytes())
                .await
                .is_ok()
            {
                tokio::time::sleep(wait).await;
            }
        };
        let (seen, body) = tokio::select! {
            answer = asked => answer,
            () = async { answers.await; std::future::pending().await } => unreachable!(),
        };
        assert_eq!(seen, status, "{goes_on:?}: {body}");
        assert!(body.contains(words), "{body}");
    }
}

#[tokio::test]
async fn a_tunnel_that_only_one_side_ends_is_not_kept_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, listener) = impatient(folder.path(), Duration::from_mins(1)).await;
    let request = tunnel_to_site(&broker);
    let all = broker.inner.resolver.tunnels.available_permits();
    for worker_ends in [true, false] {
        let mut tunnel = ask(&broker, request.clone()).await;
        assert!(head(&mut tunnel).await.starts_with("http/1.1 200"));
        let (mut host, _) = listener.accept().await.unwrap();
        assert_eq!(broker.inner.resolver.tunnels.available_permits(), all - 1);
        if worker_ends {
            tunnel.get_mut().shutdown().await.unwrap();
        } else {
            host.shutdown().await.unwrap();
        }
        // The other one says nothing, and does not go away.
        let free = async {
            while broker.inner.resolver.tunnels.available_permits() < all {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), free)
            .await
            .expect("it ends");
        drop((tunnel, host));
    }
}

#[tokio::test]
async fn who_has_said_everything_still_hears_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = broker(folder.path(), listener.local_addr().unwrap()).await;
    let request = tunnel_to_site(&broker);
    let mut tunnel = ask(&broker, request).await;
    assert!(head(&mut tunnel).await.starts_with("http/1.1 200"));
    let (mut host, _) = listener.accept().await.unwrap();
    tunnel.get_mut().write_all(b"question").await.unwrap();
    tunnel.get_mut().shutdown().await.unwrap();
    let mut heard = String::new();
    host.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "question");
    host.write_all(b"answer").await.unwrap();
    drop(host);
    heard.clear();
    tunnel.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "answer");
}
