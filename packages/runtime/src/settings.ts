/**
 * Owns the one table of settings: every flag, environment variable, default, bound and meaning.
 * docs/configuration.md is checked against it.
 *
 * Invariants
 * 1. No other file names a LAMINA_* variable, save the launcher scripts that run before anything is installed.
 * 2. The flag of a setting is its variable without LAMINA_, in kebab case. Units stand in the names.
 */
import { cpus } from 'node:os';
import { TENSOR_LINK_KINDS } from '@lamina/bus';
import { z } from 'zod';

export const SERVICES = ['gateway', 'dense-executor', 'attention-shard', 'kv-manager'] as const;
export type Service = (typeof SERVICES)[number];

interface Setting<T> {
  readonly env: `LAMINA_${string}`;
  readonly fallback: string;
  readonly schema: z.ZodType<T, string>;
  readonly usedBy: readonly Service[];
  readonly meaning: string;
}

const setting = <T>(entry: Setting<T>): Setting<T> => entry;

const integer = (minimum: number, maximum: number): z.ZodType<number, string> =>
  z
    .string()
    .regex(/^-?\d+$/, 'must be an integer')
    .transform(Number)
    .refine((value) => value >= minimum && value <= maximum, `must be from ${minimum} to ${maximum}`);

const text = z.string().min(1, 'must not be empty');

/** Empty: not given. */
const optionalText = z.string().transform((value) => (value === '' ? undefined : value));

const UNITS: Readonly<Record<string, number>> = { '': 1, k: 1024, m: 1024 ** 2, g: 1024 ** 3 };

/** Bytes as 1048576, 512m or 2g. */
const byteSize: z.ZodType<number, string> = z
  .string()
  .regex(/^\d+[kmg]?$/i, 'must be a number of bytes, or one with the suffix k, m or g')
  .transform((value) => Number.parseInt(value, 10) * (UNITS[value.replace(/\d/g, '').toLowerCase()] ?? 1))
  .refine((bytes) => bytes > 0 && bytes <= Number.MAX_SAFE_INTEGER, 'must be from 1 byte to 8388607g');

/**
 * Measured on two cores with SmolLM2-135M's shape in int4 (docs/performance.md): one worker of two threads makes 1.1 times
 * the tokens of one thread at 32 requests and 1.2 times at one; two workers of one thread are no better at 32 and hold the
 * weights twice.
 */
const DENSE_THREADS = String(Math.max(Math.min(2, cpus().length), Math.floor(cpus().length / 2)));

export const SETTINGS = {
  natsUrl: setting({
    env: 'LAMINA_NATS_URL',
    fallback: 'nats://127.0.0.1:4222',
    schema: text,
    usedBy: SERVICES,
    meaning: 'nats-server with JetStream; several servers separated by commas; tls://host:port where it has TLS.',
  }),
  natsConnectTimeoutMs: setting({
    env: 'LAMINA_NATS_CONNECT_TIMEOUT_MS',
    fallback: '10000',
    schema: integer(0, 600_000),
    usedBy: SERVICES,
    meaning: 'How long the first connection is tried for; later ones are tried for ever.',
  }),
  natsUser: setting({
    env: 'LAMINA_NATS_USER',
    fallback: '',
    schema: optionalText,
    usedBy: SERVICES,
    meaning: 'NATS user. Default: the name of the service; used where there is a password file.',
  }),
  natsPasswordFile: setting({
    env: 'LAMINA_NATS_PASSWORD_FILE',
    fallback: '',
    schema: optionalText,
    usedBy: SERVICES,
    meaning:
      'File with the password of the NATS user, or a directory with `<user>/password`, as `lamina nats users` makes it.',
  }),
  natsTlsCaFile: setting({
    env: 'LAMINA_NATS_TLS_CA_FILE',
    fallback: '',
    schema: optionalText,
    usedBy: SERVICES,
    meaning: 'PEM file of the authority that signed the certificate of nats-server; TLS is then a must.',
  }),
  natsTlsCertificateFile: setting({
    env: 'LAMINA_NATS_TLS_CERTIFICATE_FILE',
    fallback: '',
    schema: optionalText,
    usedBy: SERVICES,
    meaning: 'PEM file of our own certificate, for a nats-server that asks for one.',
  }),
  natsTlsKeyFile: setting({
    env: 'LAMINA_NATS_TLS_KEY_FILE',
    fallback: '',
    schema: optionalText,
    usedBy: SERVICES,
    meaning: 'PEM file of the key of that certificate.',
  }),
  logLevel: setting({
    env: 'LAMINA_LOG_LEVEL',
    fallback: 'info',
    schema: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'silent']),
    usedBy: SERVICES,
    meaning: 'Least severity that is logged (JSON lines on stderr).',
  }),
  requestTimeoutMs: setting({
    env: 'LAMINA_REQUEST_TIMEOUT_MS',
    fallback: '5000',
    schema: integer(50, 600_000),
    usedBy: SERVICES,
    meaning: 'How long a control-plane request waits for its reply.',
  }),
  model: setting({
    env: 'LAMINA_MODEL',
    fallback: 'models/lamina-tiny',
    schema: text,
    usedBy: ['gateway', 'dense-executor'],
    meaning:
      'The model: a directory, or a repository of the hub as `owner/name[@revision][:folder]`, which is pulled if it is not cached.',
  }),
  cacheDir: setting({
    env: 'LAMINA_CACHE_DIR',
    fallback: '.lamina/cache',
    schema: text,
    usedBy: ['gateway', 'dense-executor'],
    meaning: 'Directory for pulled models and for graphs that are built from them.',
  }),
  weights: setting({
    env: 'LAMINA_WEIGHTS',
    fallback: 'f32',
    schema: z.enum(['checkpoint', 'f32', 'f16', 'int8', 'int4']),
    usedBy: ['dense-executor'],
    meaning:
      'How weights are stored: `f32`, `int8` (fastest in batches) and `int4` (smallest) are built into the cache; `checkpoint` copies nothing and takes more memory.',
  }),
  onnxVariant: setting({
    env: 'LAMINA_ONNX_VARIANT',
    fallback: 'auto',
    schema: text.transform((variant) => (variant === 'auto' ? undefined : variant)),
    usedBy: ['gateway', 'dense-executor'],
    meaning:
      'Of a published ONNX decoder, which of its files: `fp32` is model.onnx, `q4` model_q4.onnx, and so on; `auto` takes the only one, else fp32.',
  }),
  httpHost: setting({
    env: 'LAMINA_HTTP_HOST',
    fallback: '127.0.0.1',
    schema: text,
    usedBy: ['gateway'],
    meaning: 'Address that the HTTP server listens on.',
  }),
  httpPort: setting({
    env: 'LAMINA_HTTP_PORT',
    fallback: '8080',
    schema: integer(0, 65_535),
    usedBy: ['gateway'],
    meaning: 'Port of the OpenAI API, /health and /metrics; 0 takes any free one.',
  }),
  httpBodyBytes: setting({
    env: 'LAMINA_HTTP_BODY_BYTES',
    fallback: '4m',
    schema: byteSize,
    usedBy: ['gateway'],
    meaning: 'Largest body of an HTTP request; suffix k, m or g.',
  }),
  httpCorsOrigin: setting({
    env: 'LAMINA_HTTP_CORS_ORIGIN',
    fallback: '',
    schema: optionalText,
    usedBy: ['gateway'],
    meaning: 'Origin of web pages that may call the HTTP API from a browser, or `*` for any; `none` allows none.',
  }),
  apiKeysFile: setting({
    env: 'LAMINA_API_KEYS_FILE',
    fallback: '',
    schema: optionalText,
    usedBy: ['gateway'],
    meaning: 'File of API keys for /v1, a line `client:key` each; `none` asks for no key.',
  }),
  requestsPerMinute: setting({
    env: 'LAMINA_REQUESTS_PER_MINUTE',
    fallback: '0',
    schema: integer(0, 1_000_000),
    usedBy: ['gateway'],
    meaning: 'HTTP requests for an answer of one client that one gateway takes in a minute; 0 = any number.',
  }),
  // More than the requests that a gateway has open: whoever polls or cancels all of them at once is not refused.
  followUpsPerMinute: setting({
    env: 'LAMINA_FOLLOW_UPS_PER_MINUTE',
    fallback: '6000',
    schema: integer(0, 1_000_000),
    usedBy: ['gateway'],
    meaning:
      'HTTP requests of one client about requests that were sent (/v1/requests: state, tokens, cancellation) that one gateway takes in a minute; 0 = any number.',
  }),
  maxOpenRequests: setting({
    env: 'LAMINA_MAX_OPEN_REQUESTS',
    fallback: '4096',
    schema: integer(1, 1_000_000),
    usedBy: ['gateway'],
    meaning: 'Prompts that one gateway relays at a time; more are refused as overloaded.',
  }),
  maxWaitingWork: setting({
    env: 'LAMINA_MAX_WAITING_WORK',
    fallback: '64',
    schema: integer(1, 10_000),
    usedBy: ['gateway'],
    meaning:
      'Work items that wait for an executor at a time; further requests wait at their gateway, in an order that is fair between clients.',
  }),
  maxOpenPerClient: setting({
    env: 'LAMINA_MAX_OPEN_PER_CLIENT',
    fallback: '1024',
    schema: integer(1, 1_000_000),
    usedBy: ['gateway'],
    meaning: 'Of these, how many one client may have; more are refused as overloaded.',
  }),
  denseWorkers: setting({
    env: 'LAMINA_DENSE_WORKERS',
    fallback: '1',
    schema: integer(1, 256),
    usedBy: ['dense-executor'],
    meaning: 'Worker threads, each with its own ONNX Runtime session, weights and NATS connection.',
  }),
  wavesPerWorker: setting({
    env: 'LAMINA_WAVES_PER_WORKER',
    fallback: '2',
    schema: integer(1, 16),
    usedBy: ['dense-executor'],
    meaning:
      'Most waves that one worker staggers: while one waits for its attention, another computes. How many it uses is measured.',
  }),
  intraOpThreads: setting({
    env: 'LAMINA_INTRA_OP_THREADS',
    fallback: DENSE_THREADS,
    schema: integer(1, 256),
    usedBy: ['dense-executor'],
    meaning: 'Threads of one ONNX Runtime session. Default: half the cores, at least two if there are two.',
  }),
  maxBatchedTokens: setting({
    env: 'LAMINA_MAX_BATCHED_TOKENS',
    fallback: '1024',
    schema: integer(1, 65_536),
    usedBy: ['dense-executor'],
    meaning: 'Tokens of one step of one wave, decode and prefill together.',
  }),
  prefillChunkTokens: setting({
    env: 'LAMINA_PREFILL_CHUNK_TOKENS',
    fallback: '128',
    schema: integer(1, 65_536),
    usedBy: ['dense-executor'],
    meaning:
      'Prompt tokens of one request in one step while others decode: more is faster for the prompt and slower for them.',
  }),
  speculation: setting({
    env: 'LAMINA_SPECULATION',
    fallback: 'auto',
    schema: z.enum(['auto', 'off']),
    usedBy: ['dense-executor'],
    meaning:
      '`auto`: while few requests decode, tokens are guessed from the context and verified several at a time; the answer is the same.',
  }),
  maxRunningRequests: setting({
    env: 'LAMINA_MAX_RUNNING_REQUESTS',
    fallback: '64',
    schema: integer(1, 65_536),
    usedBy: ['dense-executor'],
    meaning: 'Requests that one executor takes from the queue at a time.',
  }),
  gatherTimeoutMs: setting({
    env: 'LAMINA_GATHER_TIMEOUT_MS',
    fallback: '10000',
    schema: integer(10, 600_000),
    usedBy: ['dense-executor'],
    meaning: 'How long one step waits for the attention of a layer before it is given up.',
  }),
  tensorLink: setting({
    env: 'LAMINA_TENSOR_LINK',
    fallback: 'auto',
    schema: z.enum(TENSOR_LINK_KINDS),
    usedBy: ['dense-executor', 'attention-shard'],
    meaning:
      'Connection that tensors travel on: `native`, `nats` (nats.js, slower), or `auto`: native unless it is not built or nats-server wants TLS.',
  }),
  tensorChecksum: setting({
    env: 'LAMINA_TENSOR_CHECKSUM',
    fallback: 'header',
    schema: z.enum(['header', 'all']),
    usedBy: ['dense-executor'],
    meaning:
      'What the checksum of tensor frames covers besides plans: their headers, or `all` with the tensors, where the network is not trusted to.',
  }),
  kvBudgetBytes: setting({
    env: 'LAMINA_KV_BUDGET_BYTES',
    fallback: '256m',
    schema: byteSize,
    usedBy: ['attention-shard'],
    meaning: 'Memory for KV blocks; suffix k, m or g. Never exceeded.',
  }),
  attentionThreads: setting({
    env: 'LAMINA_ATTENTION_THREADS',
    fallback: String(Math.min(256, cpus().length)),
    schema: integer(1, 256),
    usedBy: ['attention-shard'],
    meaning: 'Threads of the attention kernel. Default: all cores, since executors wait while shards work.',
  }),
  attentionKernel: setting({
    env: 'LAMINA_ATTENTION_KERNEL',
    fallback: 'auto',
    schema: z.enum(['auto', 'native', 'portable']),
    usedBy: ['attention-shard'],
    meaning: '`auto` takes the native kernel if it was built, else the portable one.',
  }),
  blockSizeTokens: setting({
    env: 'LAMINA_BLOCK_SIZE_TOKENS',
    fallback: '16',
    schema: integer(8, 1024).refine((value) => value % 8 === 0, 'must be a multiple of 8'),
    usedBy: ['kv-manager'],
    meaning: 'Tokens of one KV block.',
  }),
  kvDtype: setting({
    env: 'LAMINA_KV_DTYPE',
    fallback: 'f16',
    schema: z.enum(['f16', 'f32']),
    usedBy: ['kv-manager'],
    meaning: 'How K and V are stored, and q, k, v and the attention travel.',
  }),
  spreadAboveTokens: setting({
    env: 'LAMINA_SPREAD_ABOVE_TOKENS',
    fallback: '128',
    schema: integer(0, 1_000_000_000),
    usedBy: ['kv-manager'],
    meaning: 'The first tokens of a request stay together on one shard; blocks beyond them spread over all shards.',
  }),
  heartbeatIntervalMs: setting({
    env: 'LAMINA_HEARTBEAT_INTERVAL_MS',
    fallback: '1000',
    schema: integer(20, 60_000),
    usedBy: ['kv-manager'],
    meaning: 'How often shards and executors report to the kv-manager.',
  }),
  heartbeatTimeoutMs: setting({
    env: 'LAMINA_HEARTBEAT_TIMEOUT_MS',
    fallback: '4000',
    schema: integer(50, 600_000),
    usedBy: ['kv-manager'],
    meaning: 'Silence after which a shard or an executor counts as lost.',
  }),
} as const;

export type SettingName = keyof typeof SETTINGS;
export type Config = { readonly [Name in SettingName]: (typeof SETTINGS)[Name] extends Setting<infer T> ? T : never };

/** Variables of the launcher, of docker-compose and of the tests: no service reads them, none refuses them. */
export const LAUNCHER_VARIABLES: Readonly<Record<`LAMINA_${string}`, string>> = {
  LAMINA_NATS_SERVER: 'Path of the nats-server binary that `npm run demo`, `npm start` and `npm test` use.',
  LAMINA_IMAGE: 'Compose: name of the image of all four services.',
  LAMINA_NATS_IMAGE: 'Compose: name of the nats image that is built on NATS_IMAGE.',
  LAMINA_NODE_IMAGE: 'Compose: base image, Node 20.19 or later on Debian.',
  LAMINA_BUILD_NETWORK: 'Compose: network of the image builds.',
  LAMINA_PULL_POLICY: 'Compose: when images are pulled.',
  LAMINA_HTTP_BIND: 'Compose: host address of the gateway.',
  LAMINA_NATS_BIND: 'Compose: host address of nats.',
  LAMINA_NATS_PORT: 'Compose: host port of nats.',
  LAMINA_NATS_ANONYMOUS: 'Compose: what a connection without a user may do: `durable-client`, `client` or `none`.',
  LAMINA_CERTIFICATES_DIR: 'Compose with TLS: host directory of the certificates.',
  LAMINA_MODELS_DIR: 'Compose: host directory of models, mounted read-only.',
  LAMINA_MODEL_NAME: 'Compose: what is served: a directory in it, or a repository of the hub.',
  LAMINA_SHARD_CPUS: 'Compose: CPUs of one attention-shard.',
  LAMINA_SHARD_MEMORY: 'Compose: memory limit of one attention-shard.',
  LAMINA_DENSE_CPUS: 'Compose: CPUs of one dense-executor.',
  LAMINA_DENSE_MEMORY: 'Compose: memory limit of one dense-executor.',
  LAMINA_GATEWAY_CPUS: 'Compose: CPUs of the gateway.',
  LAMINA_GATEWAY_MEMORY: 'Compose: memory limit of the gateway.',
  LAMINA_KV_MANAGER_MEMORY: 'Compose: memory limit of the kv-manager.',
  LAMINA_NATS_MEMORY: 'Compose: memory limit of nats.',
  LAMINA_OFFLINE_IMAGES: 'Tests: build the containers on images that are made from this machine.',
  LAMINA_PROPERTIES:
    'Tests: `long` runs 100,000 random sequences of events on the block tables and on the request machine.',
  LAMINA_FUZZ: 'Tests: `long` sends a million mutated messages to the decoders, 10,000 to each subject of a cluster.',
  LAMINA_E2E_REQUIRED: 'Tests: a missing Docker Engine is a failure, not a skip.',
};

/** --kv-budget-bytes for LAMINA_KV_BUDGET_BYTES. */
export function flagOf(name: SettingName): string {
  return SETTINGS[name].env.slice('LAMINA_'.length).toLowerCase().replaceAll('_', '-');
}
