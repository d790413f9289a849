//! `#[derive(State)]` for the crate `graph`: reads a struct's fields as channels and writes its partial update type.
//!
//! Not for use by itself; `graph` re-exports it.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{Data, DeriveInput, Expr, Field, Fields, Ident, Type, Visibility, parse_macro_input};

/// Makes a struct with named fields a state; each field is a channel.
///
/// - `#[channel(append)]`: updates are items that go to the end of a list;
/// - `#[channel(merge)]`: updates are entries that go into a map or set;
/// - `#[channel(reduce = function)]`: `fn function(value: &mut T, update: T)`; with `#[channel(reduce = function, update = U)]`
///   the update has a type of its own;
/// - without an attribute: the last value; two updates in one step are an error.
///
/// The partial update is called like the struct with `Update` after it: every field optional, a setter for each.
#[proc_macro_derive(State, attributes(channel))]
pub fn derive_state(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input)
        .unwrap_or_else(|error| error.to_compile_error())
        .into()
}

enum Reducer {
    Last,
    Append,
    Merge,
    Reduce(Expr),
}

struct Channel<'a> {
    ident: &'a Ident,
    name: String,
    vis: &'a Visibility,
    ty: &'a Type,
    update: Type,
    reducer: Reducer,
}

impl<'a> Channel<'a> {
    fn parse(field: &'a Field) -> syn::Result<Self> {
        let ident = field
            .ident
            .as_ref()
            .ok_or_else(|| syn::Error::new_spanned(field, "a channel needs a name"))?;
        let mut reducer = None;
        let mut update = None;
        for attribute in &field.attrs {
            if !attribute.path().is_ident("channel") {
                continue;
            }
            attribute.parse_nested_meta(|meta| {
                let found = if meta.path.is_ident("append") {
                    Reducer::Append
                } else if meta.path.is_ident("merge") {
                    Reducer::Merge
                } else if meta.path.is_ident("last") {
                    Reducer::Last
                } else if meta.path.is_ident("reduce") {
                    Reducer::Reduce(meta.value()?.parse()?)
                } else if meta.path.is_ident("update") {
                    update = Some(meta.value()?.parse::<Type>()?);
                    return Ok(());
                } else {
                    return Err(meta.error(
                        "expected `append`, `merge`, `last`, `reduce = function` or `update = Type`",
                    ));
                };
                if reducer.replace(found).is_some() {
                    return Err(meta.error("a channel has one reducer"));
                }
                Ok(())
            })?;
        }
        let reducer = reducer.unwrap_or(Reducer::Last);
        if update.is_some() && !matches!(reducer, Reducer::Reduce(_)) {
            return Err(syn::Error::new_spanned(
                field,
                "`update = Type` goes with `reduce = function` only",
            ));
        }
        let name = ident.to_string();
        Ok(Self {
            ident,
            name: name.strip_prefix("r#").unwrap_or(&name).to_owned(),
            vis: &field.vis,
            ty: &field.ty,
            update: update.unwrap_or_else(|| field.ty.clone()),
            reducer,
        })
    }
}

fn expand(input: &DeriveInput) -> syn::Result<TokenStream> {
    if !input.generics.params.is_empty() {
        return Err(syn::Error::new_spanned(
            &input.generics,
            "a state cannot be generic",
        ));
    }
    let Data::Struct(data) = &input.data else {
        return Err(syn::Error::new_spanned(
            &input.ident,
            "a state is a struct with named fields",
        ));
    };
    let Fields::Named(fields) = &data.fields else {
        return Err(syn::Error::new_spanned(
            &input.ident,
            "a state is a struct with named fields",
        ));
    };
    let mut channels = Vec::new();
    let mut errors: Option<syn::Error> = None;
    for field in &fields.named {
        match Channel::parse(field) {
            Ok(channel) => channels.push(channel),
            Err(error) => match &mut errors {
                Some(all) => all.combine(error),
                None => errors = Some(error),
            },
        }
    }
    if let Some(errors) = errors {
        return Err(errors);
    }
    let update = update_type(input, &channels);
    let state = state_impl(input, &channels);
    Ok(quote!(#update #state))
}

fn update_name(input: &DeriveInput) -> Ident {
    format_ident!("{}Update", input.ident)
}

fn update_type(input: &DeriveInput, channels: &[Channel<'_>]) -> TokenStream {
    let vis = &input.vis;
    let name = update_name(input);
    let state_name = input.ident.to_string();
    let doc =
        format!("A partial update of [`{state_name}`]: only the channels that are set change.");

    let fields = channels.iter().map(|channel| {
        let Channel {
            ident, vis, update, ..
        } = channel;
        let doc = format!(
            "An update of the channel `{}`, if it changes.",
            channel.name
        );
        quote!(#[doc = #doc] #vis #ident: ::core::option::Option<#update>,)
    });
    let setters = channels.iter().map(|channel| {
        let Channel { ident, vis, update, .. } = channel;
        let body = if matches!(channel.reducer, Reducer::Append | Reducer::Merge) {
            quote! {
                match &mut self.#ident {
                    ::core::option::Option::Some(present) => ::core::iter::Extend::extend(present, value),
                    ::core::option::Option::None => self.#ident = ::core::option::Option::Some(value),
                }
            }
        } else {
            quote!(self.#ident = ::core::option::Option::Some(value);)
        };
        let doc = match channel.reducer {
            Reducer::Last | Reducer::Reduce(_) => format!("Sets the update of the channel `{}`.", channel.name),
            Reducer::Append | Reducer::Merge => format!("Adds to the update of the channel `{}`.", channel.name),
        };
        quote! {
            #[doc = #doc]
            #[allow(dead_code)]
            #[must_use]
            #vis fn #ident(mut self, value: #update) -> Self { #body self }
        }
    });
    let touches = channels.iter().enumerate().map(|(index, channel)| {
        let ident = channel.ident;
        quote!(#index => self.#ident.is_some(),)
    });
    let to = channels.iter().map(|channel| {
        let Channel { ident, name, .. } = channel;
        quote! {
            if let ::core::option::Option::Some(value) = &self.#ident {
                channels.insert(
                    ::std::string::String::from(#name),
                    ::graph::__private::to_value(#name, value)?,
                );
            }
        }
    });
    let from = channels.iter().map(|channel| {
        let Channel { ident, name, .. } = channel;
        quote! {
            #name => update.#ident = ::core::option::Option::Some(::graph::__private::from_value(#name, value)?),
        }
    });
    let read = channels.iter().map(|channel| {
        let Channel { ident, name, .. } = channel;
        quote! {
            #name => update.#ident = ::core::option::Option::Some(::graph::__private::from_ref(#name, value)?),
        }
    });
    let debug = channels.iter().map(|channel| {
        let Channel { ident, name, .. } = channel;
        quote!(if self.#ident.is_some() { names.push(#name); })
    });
    let state = &input.ident;
    quote! {
        #[doc = #doc]
        #[derive(::core::clone::Clone, ::core::default::Default)]
        #vis struct #name { #(#fields)* }

        #[automatically_derived]
        impl #name { #(#setters)* }

        #[automatically_derived]
        impl ::graph::Update for #name {
            fn touches(&self, index: usize) -> bool {
                match index { #(#touches)* _ => false }
            }

            fn to_channels(&self) -> ::core::result::Result<::graph::checkpoint::Channels, ::graph::ChannelError> {
                #[allow(unused_mut)]
                let mut channels = ::graph::checkpoint::Channels::new();
                #(#to)*
                ::core::result::Result::Ok(channels)
            }

            fn from_channels(
                channels: ::graph::checkpoint::Channels,
            ) -> ::core::result::Result<Self, ::graph::ChannelError> {
                #[allow(unused_mut)]
                let mut update = Self::default();
                for (name, value) in channels {
                    match name.as_str() {
                        #(#from)*
                        _ => {
                            ::core::mem::drop(value);
                            return ::core::result::Result::Err(
                                ::graph::__private::unknown_channel::<#state>(name),
                            );
                        }
                    }
                }
                ::core::result::Result::Ok(update)
            }

            fn read_channels(
                channels: &::graph::checkpoint::Channels,
            ) -> ::core::result::Result<Self, ::graph::ChannelError> {
                #[allow(unused_mut)]
                let mut update = Self::default();
                for (name, value) in channels {
                    match name.as_str() {
                        #(#read)*
                        _ => {
                            let _ = value;
                            return ::core::result::Result::Err(
                                ::graph::__private::unknown_channel::<#state>(
                                    ::std::string::String::from(name.as_str()),
                                ),
                            );
                        }
                    }
                }
                ::core::result::Result::Ok(update)
            }
        }

        #[automatically_derived]
        impl ::core::fmt::Debug for #name {
            /// Names the channels that change; values may be large, and are not shown.
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                #[allow(unused_mut)]
                let mut names: ::std::vec::Vec<&str> = ::std::vec::Vec::new();
                #(#debug)*
                ::graph::__private::debug_update(f, stringify!(#name), &names)
            }
        }

        #[automatically_derived]
        impl ::graph::__private::serde::Serialize for #name {
            fn serialize<Z: ::graph::__private::serde::Serializer>(
                &self,
                serializer: Z,
            ) -> ::core::result::Result<Z::Ok, Z::Error> {
                ::graph::__private::serialize_update(self, serializer)
            }
        }

        #[automatically_derived]
        impl<'de> ::graph::__private::serde::Deserialize<'de> for #name {
            fn deserialize<Z: ::graph::__private::serde::Deserializer<'de>>(
                deserializer: Z,
            ) -> ::core::result::Result<Self, Z::Error> {
                ::graph::__private::deserialize_update(deserializer)
            }
        }

        #[automatically_derived]
        impl ::core::convert::From<#name> for ::graph::Outcome<#state> {
            fn from(update: #name) -> Self {
                ::graph::Outcome::update(update)
            }
        }
    }
}

fn state_impl(input: &DeriveInput, channels: &[Channel<'_>]) -> TokenStream {
    let state = &input.ident;
    let name = update_name(input);
    let list = channels.iter().map(|channel| {
        let text = &channel.name;
        let reducer = match channel.reducer {
            Reducer::Last => quote!(Last),
            Reducer::Append => quote!(Append),
            Reducer::Merge => quote!(Merge),
            Reducer::Reduce(_) => quote!(Reduce),
        };
        quote!(::graph::Channel { name: #text, reducer: ::graph::Reducer::#reducer },)
    });
    let apply = channels.iter().map(|channel| {
        let Channel { ident, .. } = channel;
        let body = match &channel.reducer {
            Reducer::Last => quote!(self.#ident = value;),
            Reducer::Append | Reducer::Merge => {
                quote!(::core::iter::Extend::extend(&mut self.#ident, value);)
            }
            Reducer::Reduce(function) => quote!((#function)(&mut self.#ident, value);),
        };
        quote!(if let ::core::option::Option::Some(value) = update.#ident { #body })
    });
    let read = channels.iter().enumerate().map(|(index, channel)| {
        let Channel { ident, name, .. } = channel;
        quote!(#index => ::graph::__private::to_value(#name, &self.#ident),)
    });
    let overwrite = channels.iter().enumerate().map(|(index, channel)| {
        let Channel {
            ident, name, ty, ..
        } = channel;
        quote!(#index => self.#ident = ::graph::__private::from_value::<#ty>(#name, value)?,)
    });
    quote! {
        #[automatically_derived]
        impl ::graph::State for #state {
            type Update = #name;
            const CHANNELS: &'static [::graph::Channel] = &[#(#list)*];

            #[allow(unused_variables)]
            fn apply(&mut self, update: #name) {
                #(#apply)*
            }

            fn channel(
                &self,
                index: usize,
            ) -> ::core::result::Result<::graph::__private::Value, ::graph::ChannelError> {
                match index {
                    #(#read)*
                    _ => ::core::result::Result::Ok(::graph::__private::Value::Null),
                }
            }

            #[allow(unused_variables)]
            fn overwrite(
                &mut self,
                index: usize,
                value: ::graph::__private::Value,
            ) -> ::core::result::Result<(), ::graph::ChannelError> {
                match index {
                    #(#overwrite)*
                    _ => {}
                }
                ::core::result::Result::Ok(())
            }
        }
    }
}
