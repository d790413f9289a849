//! What of a server's settings may lose messages.

use super::link::Link;
use crate::TransportError;

/// In a sentence for the server's admin. It is read from `INFO`, because `CONFIG` is closed on many servers.
pub(super) async fn may_lose(link: &Link) -> Result<Option<String>, TransportError> {
    let info: String = link.ask(&redis::cmd("INFO")).await?;
    Ok(fault(&info))
}

fn fault(info: &str) -> Option<String> {
    let said = |name: &str| {
        let mut lines = info.lines().filter_map(|line| line.split_once(':'));
        lines
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value.trim())
    };
    let evicts = said("maxmemory_policy").filter(|policy| *policy != "noeviction");
    let bounded = said("maxmemory").is_some_and(|most| most != "0");
    if let Some(policy) = evicts.filter(|_| bounded) {
        return Some(format!(
            "Redis evicts what it holds when its memory is full (maxmemory-policy {policy}), jobs and results as well; set maxmemory-policy to noeviction"
        ));
    }
    (said("aof_enabled") == Some("0")).then(|| {
        "Redis forgets the last jobs and results when it is killed (appendonly no); set appendonly to yes, and appendfsync to always".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_says_nothing_of_it_is_not_blamed() {
        assert_eq!(fault(""), None);
        assert_eq!(
            fault("# Memory\r\nmaxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\naof_enabled:1\r\n"),
            None
        );
    }
}
