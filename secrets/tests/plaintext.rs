//! What a plaintext must never be able to do. A violation does not compile: an inferred `_` becomes ambiguous.

/// Fails to compile when `$type` implements `$trait`.
macro_rules! never {
    ($type:ty: $($trait:path),+ $(,)?) => {$(
        const _: fn() = || {
            trait Ambiguous<A> {
                fn some() {}
            }
            impl<T: ?Sized> Ambiguous<()> for T {}
            #[allow(dead_code)]
            struct Implements;
            impl<T: ?Sized + $trait> Ambiguous<Implements> for T {}
            let _ = <$type as Ambiguous<_>>::some;
        };
    )+};
}

never!(ports::Plaintext:
    std::fmt::Debug, std::fmt::Display, std::fmt::LowerHex, ToString,
    serde::Serialize, serde::de::DeserializeOwned,
    PartialEq, PartialOrd, std::hash::Hash, Clone, Default,
    AsRef<str>, AsRef<[u8]>, std::ops::Deref, std::borrow::Borrow<str>, Into<String>,
);
never!(secrets::Identity: std::fmt::Display, serde::Serialize, PartialEq, Clone);

#[test]
fn a_plaintext_gives_its_value_only_when_asked() {
    let value = ports::Plaintext::new("canary".to_owned());
    assert_eq!(value.expose(), "canary");
}
