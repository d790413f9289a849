//! What an engine lacks when a worker is to be started.

use crate::stage::{Cleanup, Stage, docker, kind, runtime, variable};
use spawner::runtime::{Containers, DockerOptions, Warm};
use std::sync::Arc;

#[tokio::test]
async fn an_image_that_is_gone_is_said_so_with_who_can_bring_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    drop(runtime(&home).await);
    // Of a registry that nobody would find: whatever is not here is not fetched from anywhere.
    let name = format!("127.0.0.1:1/artel/worker:gone-{}", std::process::id());
    docker(&["tag", &variable("ARTEL_TEST_IMAGE"), &name]);
    let containers = Containers::connect(DockerOptions {
        host: Some(variable("ARTEL_TEST_DOCKER_HOST")),
        runtime: "runc".to_owned(),
        image: name.clone(),
        spawner: "local".to_owned(),
        home,
        warm: Warm::default(),
    })
    .await
    .unwrap();
    docker(&["rmi", &name]);
    let cleanup = Cleanup(Some(containers.label().to_owned()));
    let stage = Stage::with(folder, Arc::new(containers), cleanup, []).await;
    let result = stage.run(&stage.script("r1", 1, "true")).await;
    assert_eq!(kind(&result), spawner::kind::IMAGE_MISSING, "{result:#?}");
    let failure = result.failure.unwrap();
    for words in [name.as_str(), "An admin", "WORKER_IMAGE"] {
        assert!(failure.message.contains(words), "{failure:#?}");
    }
    assert!(
        failure.evidence.contains("not on this machine"),
        "{failure:#?}"
    );
}
