//! Which hosts a job may reach, and which addresses nobody may.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Port of an entry that names none.
const DEFAULT_PORT: u16 = 443;

/// The hosts of a job.
pub(super) struct AllowList(Vec<Entry>);

struct Entry {
    /// Without the star; in lower case.
    host: String,
    /// Whether it stands for everything below the host.
    below: bool,
    port: u16,
}

impl AllowList {
    /// Reads `host:port`, `*.host:port`, or either without a port (443). What cannot be read allows
    /// nothing.
    pub(super) fn new(entries: &[String]) -> Self {
        Self(entries.iter().filter_map(|text| parse(text)).collect())
    }

    /// Whether the job may reach this.
    pub(super) fn allows(&self, host: &str, port: u16) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        self.0.iter().any(|entry| {
            entry.port == port
                && if entry.below {
                    host.strip_suffix(&entry.host)
                        .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
                } else {
                    host == entry.host
                }
        })
    }
}

fn parse(text: &str) -> Option<Entry> {
    let text = text.trim().to_ascii_lowercase();
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (text.as_str(), DEFAULT_PORT),
    };
    let (host, below) = match host.strip_prefix("*.") {
        Some(host) => (host, true),
        None => (host, false),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if host.is_empty() || !host.chars().all(plain) || port == 0 {
        tracing::warn!(entry = text, "{text:?} is no host and allows nothing");
        return None;
    }
    Some(Entry {
        host: host.to_owned(),
        below,
        port,
    })
}

/// Why an address is never reached from a worker; none for an ordinary public one.
pub(super) fn forbidden(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => forbidden_v4(address),
        IpAddr::V6(address) => forbidden_v6(address),
    }
}

/// Why an address of this machine is never reached from a worker, public or not; none for another machine's. What listens here
/// may trust whoever comes from here.
pub(super) fn own(address: IpAddr) -> Option<&'static str> {
    // Only an address of ours can be listened at. No packet is sent for this.
    UdpSocket::bind((address, 0))
        .is_ok()
        .then_some("addresses of the spawner's own machine are never reachable")
}

fn forbidden_v4(address: Ipv4Addr) -> Option<&'static str> {
    let [a, b, c, _] = address.octets();
    match (a, b, c) {
        (127, ..) => Some("loopback addresses are never reachable"),
        (169, 254, _) => Some("link-local and metadata addresses are never reachable"),
        (10, ..) | (172, 16..=31, _) | (192, 168, _) => {
            Some("private addresses are never reachable")
        }
        (100, 64..=127, _) => Some("shared and metadata addresses are never reachable"),
        // The wire server of one provider, which hands out credentials.
        (168, 63, 129) if address.octets()[3] == 16 => {
            Some("metadata addresses are never reachable")
        }
        (0 | 224..=255, ..)
        | (192, 0, 0 | 2)
        | (192, 88, 99)
        | (198, 18..=19, _)
        | (198, 51, 100)
        | (203, 0, 113) => Some("special addresses are never reachable"),
        _ => None,
    }
}

fn forbidden_v6(address: Ipv6Addr) -> Option<&'static str> {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        Ipv4Addr::new(a, b, c, d)
    };
    if address.is_loopback() {
        return Some("loopback addresses are never reachable");
    }
    match segments {
        // IPv4 in IPv6 clothes: mapped, compatible, NAT64, 6to4.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            forbidden_v4(embedded(high, low))
        }
        [0x2002, high, low, ..] => forbidden_v4(embedded(high, low)),
        [0x64, 0xff9b, ..] | [0x2001, 0 | 0xdb8, ..] | [0x100, 0, 0, 0, ..] => {
            Some("special addresses are never reachable")
        }
        [first, ..] => match first {
            0xfe80..=0xfebf => Some("link-local addresses are never reachable"),
            0xfc00..=0xfdff | 0xfec0..=0xfeff => Some("private addresses are never reachable"),
            0x2000..=0x3fff => None,
            _ => Some("special addresses are never reachable"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_matched_whole_with_their_port() {
        let entries = [
            "Packages.Example:443",
            "*.example.org:8443",
            "plain.net",
            "bad host:1",
            "x:0",
            ":1",
        ];
        let allow = AllowList::new(&entries.map(str::to_owned));
        for (host, port) in [
            ("packages.example", 443),
            ("packages.example.", 443),
            ("a.b.example.org", 8443),
            ("plain.net", 443),
        ] {
            assert!(allow.allows(host, port), "{host}:{port}");
        }
        for (host, port) in [
            ("packages.example", 80),
            ("evilpackages.example", 443),
            ("packages.example.evil.net", 443),
            ("example.org", 8443),
            (".example.org", 8443),
            ("evilexample.org", 8443),
            ("bad host", 1),
            ("", 443),
        ] {
            assert!(!allow.allows(host, port), "{host}:{port}");
        }
    }

    #[test]
    fn an_address_of_this_machine_is_known_as_its_own() {
        // Whatever else it has, it has these, and another machine has the others.
        assert!(own("127.0.0.1".parse().unwrap()).is_some());
        for address in ["192.0.2.7", "203.0.113.9"] {
            assert!(own(address.parse().unwrap()).is_none(), "{address}");
        }
    }

    #[test]
    fn no_address_inside_is_reachable_in_any_clothes() {
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff02::1",
            "2001:db8::1",
        ] {
            assert!(forbidden(address.parse().unwrap()).is_some(), "{address}");
        }
        for address in [
            "1.1.1.1",
            "93.184.216.34",
            "172.32.0.1",
            "2606:4700::1111",
            "64:ff9b::101:101",
        ] {
            assert!(forbidden(address.parse().unwrap()).is_none(), "{address}");
        }
    }
}
