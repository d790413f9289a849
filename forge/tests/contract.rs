//! The contract of a forge, on local repositories.

use forge::{LocalForge, suite};
use ports::ProjectId;

macro_rules! run {
    ($($name:ident)*) => {$(
        #[tokio::test]
        async fn $name() {
            let home = tempfile::tempdir().unwrap();
            let forge = LocalForge::new(home.path().join("repos"), None);
            suite::$name(&forge, &ProjectId::founded_by(stringify!($name))).await;
        }
    )*};
}

forge::each!(run);
