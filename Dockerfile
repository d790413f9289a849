# The images of the full size: `artel` (bot, runner, scheduler) and `spawner`. `make images` builds them.
#
# From the sources, with the whole folder as context:
#   docker build --target artel -t artel:dev .
#   docker build --target spawner -t artel-spawner:dev .
# From programs that are built already, with a context that has `artel`, `spawner` and `images/unmasked` and nothing else:
#   docker build --target artel-prebuilt -t artel:dev -f Dockerfile CONTEXT
#   docker build --target spawner-prebuilt -t artel-spawner:dev -f Dockerfile CONTEXT
# Both base images are arguments; what is installed comes from Debian's packages. Stages that are not needed for a target stand behind
# it, because Docker's older builder makes everything that stands before.
ARG BUILD_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

# What both need: Git for repositories and workspaces, bubblewrap for code from models, Python for what is built.
FROM ${BASE_IMAGE} AS base
RUN export DEBIAN_FRONTEND=noninteractive \
  && apt-get update -qq \
  && apt-get install -y -qq --no-install-recommends bubblewrap ca-certificates git python3 util-linux \
  && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/artel --create-home --shell /usr/sbin/nologin artel
COPY images/unmasked /usr/local/bin/unmasked
ENV ARTEL_HOME=/var/lib/artel ARTEL_LOG=json
WORKDIR /var/lib/artel
USER artel
VOLUME /var/lib/artel

FROM base AS spawner-base
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["spawner", "health"]
ENTRYPOINT ["spawner"]

FROM base AS artel-base
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["artel", "health"]
ENTRYPOINT ["artel"]
CMD ["up"]

FROM spawner-base AS spawner-prebuilt
COPY spawner /usr/local/bin/spawner

FROM artel-base AS artel-prebuilt
COPY artel /usr/local/bin/artel

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p artel --bins

FROM spawner-base AS spawner
COPY --from=build /src/target/release/spawner /usr/local/bin/spawner

FROM artel-base AS artel
COPY --from=build /src/target/release/artel /usr/local/bin/artel
