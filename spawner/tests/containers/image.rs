//! The image of workers: `scripts/image`, on the tests' base and without packages, because those take minutes. `make image` is the
//! same with Debian's packages.

use crate::stage::{PROGRAM, docker, variable};
use std::process::Command;

#[test]
fn the_image_of_workers_is_built_and_has_launcher_agent_and_tools_for_a_user_without_rights() {
    let name = format!("artel-test-built:{}", std::process::id());
    let built = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/image"))
        .env("DOCKER_HOST", variable("ARTEL_TEST_DOCKER_HOST"))
        .env("BASE", variable("ARTEL_TEST_IMAGE"))
        .env("IMAGE", &name)
        .env("INSIDE", PROGRAM)
        .env("PACKAGES", "")
        .env("AGENTS", "")
        .output()
        .unwrap();
    assert!(built.status.success(), "{built:?}");
    let script = "id -u; id -g; pwd; echo $HOME; /usr/local/bin/artel-agent --version; git --version; python3 --version
        touch /workspace/x /home/artel/x && echo writes; touch /usr/local/bin/x 2>/dev/null || echo refused
        /usr/local/bin/artel-inside internal launch --out 127.0.0.1:8118=/nowhere -- true && echo launched";
    let said = docker(&[
        "run",
        "--rm",
        "--network",
        "none",
        &name,
        "sh",
        "-c",
        script,
    ]);
    let labelled = docker(&[
        "inspect",
        "-f",
        "{{.Config.User}} {{json .Config.Cmd}}",
        &name,
    ]);
    docker(&["rmi", "-f", &name]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(
        lines[..4],
        ["1000", "1000", "/workspace", "/home/artel"],
        "{said}"
    );
    assert_eq!(
        lines[4],
        concat!("artel-agent ", env!("CARGO_PKG_VERSION")),
        "{said}"
    );
    for word in ["git version", "Python 3", "writes", "refused"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(said.contains("launched"), "{said}");
    assert_eq!(
        labelled.trim(),
        "1000:1000 [\"/usr/local/bin/artel-agent\"]"
    );
}
