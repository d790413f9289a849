//! What a question would have the model's provider reach in the worker's stead.
//!
//! A provider that searches the web, calls a server of tools or loads a picture from an address is a way past the job's list
//! of hosts. Tools of that kind are taken out of a question, and a question that names an address elsewhere is not sent.

use super::Inner;
use super::allow::AllowList;
use serde_json::Value;

/// Deepest part of a question that is looked at.
const MAX_DEPTH: u32 = 64;
/// Tools that a provider carries out itself and that reach out, by the beginning of their type.
const REACHING_TOOLS: [&str; 4] = ["web_search", "web_fetch", "mcp", "url_context"];

/// Holds a question to the job's list of hosts; says what is wrong with one that cannot be.
pub(super) fn hold(inner: &Inner, body: &mut Value) -> Option<String> {
    for tool in confine(body, &inner.allow) {
        inner.events.refused(
            &tool,
            "a tool with which the model's provider would reach beyond the job's list of hosts",
        );
    }
    let url = foreign(body, &inner.allow)?;
    inner.events.refused(&url, "not on the job's list of hosts");
    Some(format!(
        "{url} is not on the job's list of hosts; send the content itself"
    ))
}

/// Takes out of a question what would reach beyond the list; says what that was.
fn confine(body: &mut Value, allow: &AllowList) -> Vec<String> {
    let mut taken = Vec::new();
    confine_tools(body, allow, 0, &mut taken);
    // Tools also come as a part of what is said.
    if let Some(items) = body.get_mut("input").and_then(Value::as_array_mut) {
        for item in items {
            confine_tools(item, allow, 0, &mut taken);
        }
    }
    if let Some(servers) = body.get_mut("mcp_servers").and_then(Value::as_array_mut) {
        servers.retain(|server| {
            let stays = server["url"].as_str().is_some_and(|url| listed(url, allow));
            if !stays {
                taken.push("mcp_servers".to_owned());
            }
            stays
        });
    }
    // Searching is no tool but a setting in chat completions.
    if let Some(body) = body.as_object_mut()
        && body.remove("web_search_options").is_some()
    {
        taken.push("web_search_options".to_owned());
    }
    taken
}

/// The tools of one object; a tool may be a group of others.
fn confine_tools(holder: &mut Value, allow: &AllowList, depth: u32, taken: &mut Vec<String>) {
    let before = taken.len();
    let Some(tools) = holder.get_mut("tools").and_then(Value::as_array_mut) else {
        return;
    };
    tools.retain_mut(|tool| {
        let kind = tool["type"].as_str().unwrap_or_default();
        let reaches = REACHING_TOOLS.iter().any(|name| kind.starts_with(name));
        let stays = !reaches
            || tool["server_url"]
                .as_str()
                .is_some_and(|url| listed(url, allow));
        if !stays || depth >= MAX_DEPTH {
            taken.push(kind.to_owned());
            return false;
        }
        confine_tools(tool, allow, depth + 1, taken);
        true
    });
    if tools.is_empty()
        && taken.len() > before
        && let Some(holder) = holder.as_object_mut()
    {
        holder.remove("tools");
        holder.remove("tool_choice");
    }
}

/// The first address in a question that the provider would load and the job may not.
fn foreign(body: &Value, allow: &AllowList) -> Option<String> {
    ["messages", "input", "system", "instructions"]
        .iter()
        .find_map(|name| look(&body[*name], allow, 0))
}

fn look(value: &Value, allow: &AllowList, depth: u32) -> Option<String> {
    if depth > MAX_DEPTH {
        return Some("something nested too deeply to be looked at".to_owned());
    }
    match value {
        Value::Array(items) => items.iter().find_map(|item| look(item, allow, depth + 1)),
        Value::Object(fields) => {
            let url = match fields.get("type").and_then(Value::as_str) {
                Some("url") => fields.get("url"),
                Some("image_url") => fields
                    .get("image_url")
                    .map(|image| image.get("url").unwrap_or(image)),
                Some("input_image") => fields.get("image_url"),
                Some("input_file" | "file") => fields.get("file_url"),
                _ => None,
            };
            let loaded = |url: &&str| !url.starts_with("data:") && !listed(url, allow);
            match url.and_then(Value::as_str).filter(loaded) {
                Some(url) => Some(url.chars().take(200).collect()),
                None => fields
                    .values()
                    .find_map(|field| look(field, allow, depth + 1)),
            }
        }
        _ => None,
    }
}

fn listed(url: &str, allow: &AllowList) -> bool {
    let Ok(uri) = url.parse::<hyper::Uri>() else {
        return false;
    };
    let port = match (uri.scheme_str(), uri.port_u16()) {
        (Some("http"), port) => port.unwrap_or(80),
        (Some("https"), port) => port.unwrap_or(443),
        _ => return false,
    };
    uri.host().is_some_and(|host| allow.allows(host, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn allow() -> AllowList {
        AllowList::new(&["files.example:443".to_owned()])
    }

    #[test]
    fn tools_that_reach_out_are_taken_out_and_others_stay() {
        let mut body = json!({"tools": [
            {"type": "function", "name": "shell"},
            {"name": "without a type"},
            {"type": "bash_20250124", "name": "bash"},
            {"type": "web_search_20250305", "name": "web_search"},
            {"type": "web_search"},
            {"type": "web_fetch_20250910"},
            {"type": "mcp", "server_url": "https://evil.example/"},
            {"type": "mcp", "server_url": "https://files.example/tools"},
        ], "mcp_servers": [{"type": "url", "url": "https://evil.example/"}], "web_search_options": {}});
        let taken = confine(&mut body, &allow());
        assert_eq!(taken.len(), 6, "{taken:?}");
        let left = body["tools"].as_array().unwrap();
        assert_eq!(left.len(), 4);
        assert_eq!(left[3]["server_url"], "https://files.example/tools");
        assert_eq!(body["mcp_servers"], json!([]));
        let mut only =
            json!({"tools": [{"type": "web_search"}], "tool_choice": "auto", "input": "x"});
        confine(&mut only, &allow());
        assert_eq!(only, json!({"input": "x"}));
    }

    #[test]
    fn an_address_elsewhere_is_found_wherever_it_stands() {
        let picture = |source: Value| json!({"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]});
        for body in [
            picture(json!({"type": "url", "url": "https://evil.example/?secret"})),
            json!({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://evil.example/"}}]}]}),
            json!({"input": [{"content": [{"type": "input_image", "image_url": "https://evil.example/"}]}]}),
            json!({"input": [{"content": [{"type": "input_file", "file_url": "https://files.example:8443/"}]}]}),
            json!({"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": "ftp://files.example/"}]}]}),
        ] {
            assert!(foreign(&body, &allow()).is_some(), "{body}");
        }
        for body in [
            picture(json!({"type": "base64", "data": "eA=="})),
            picture(json!({"type": "url", "url": "https://files.example/x.png"})),
            json!({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}]}]}),
            json!({"messages": [{"role": "user", "content": "see https://evil.example/"}]}),
            json!({"input": "see https://evil.example/"}),
        ] {
            assert_eq!(foreign(&body, &allow()), None, "{body}");
        }
    }
}
