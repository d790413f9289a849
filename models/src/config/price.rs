//! What models cost.

use jiff::civil::Date;
use ports::Usage;
use serde::Deserialize;

/// What a model costs.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// US dollars for a million tokens read.
    pub input_per_million_usd: f64,
    /// US dollars for a million tokens written.
    pub output_per_million_usd: f64,
    /// US dollars for a million tokens read from the endpoint's cache; none: the price of tokens read.
    #[serde(default)]
    pub cache_read_per_million_usd: Option<f64>,
    /// US dollars for a million tokens read and written into that cache; none: the price of tokens read.
    #[serde(default)]
    pub cache_write_per_million_usd: Option<f64>,
    /// The day on which somebody looked this up.
    pub as_of: Date,
}

impl Price {
    /// A price without special ones for cached tokens.
    pub fn new(input_per_million_usd: f64, output_per_million_usd: f64, as_of: Date) -> Self {
        Self {
            input_per_million_usd,
            output_per_million_usd,
            cache_read_per_million_usd: None,
            cache_write_per_million_usd: None,
            as_of,
        }
    }

    /// What these tokens cost, where a part of those read came from the cache or went into it.
    pub(crate) fn cost_with_cache(&self, input: u64, read: u64, written: u64, output: u64) -> f64 {
        let plain = self.input_per_million_usd;
        let cached = |tokens: u64, price: Option<f64>| {
            // Counts of tokens stay far below the 2^52 that a double holds exactly.
            #[allow(clippy::cast_precision_loss)]
            let tokens = tokens as f64;
            tokens * price.unwrap_or(plain) / 1e6
        };
        self.cost_usd(input, output)
            + cached(read, self.cache_read_per_million_usd)
            + cached(written, self.cache_write_per_million_usd)
    }

    /// How many tokens can be written for so much.
    pub(crate) fn affordable_output(&self, usd: f64) -> u64 {
        if self.output_per_million_usd <= 0.0 {
            return u64::MAX;
        }
        let tokens = (usd.max(0.0) / self.output_per_million_usd * 1e6).floor();
        // What is larger than a `u64` becomes the largest one.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let tokens = tokens as u64;
        tokens
    }

    /// What these tokens cost, in US dollars.
    pub fn cost_usd(&self, input_tokens: u64, output_tokens: u64) -> f64 {
        // Counts of tokens stay far below the 2^52 that a double holds exactly.
        #[allow(clippy::cast_precision_loss)]
        let (input, output) = (input_tokens as f64, output_tokens as f64);
        (input * self.input_per_million_usd + output * self.output_per_million_usd) / 1e6
    }
}

/// Tokens with what they cost, where a price is known.
pub(crate) fn priced(price: Option<&Price>, input_tokens: u64, output_tokens: u64) -> Usage {
    Usage {
        input_tokens,
        output_tokens,
        cost_usd: price.map(|price| price.cost_usd(input_tokens, output_tokens)),
    }
}
