/** The launcher of local clusters, for the commands and for tests. */
export { Child } from './child.ts';
export { Cluster, type ClusterOptions, ROOT_DIRECTORY, type ServiceSettings, startCluster } from './cluster.ts';
export { generate } from './demo.ts';
export { natsServerOf } from './options.ts';
export { readHealth, readShards, type ShardReport } from './probes.ts';
