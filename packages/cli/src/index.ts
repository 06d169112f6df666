/** The launcher of local clusters, for the commands and for tests. */
export { Child } from './child.ts';
export { Cluster, type ClusterOptions, type ServiceSettings, startCluster } from './cluster.ts';
export { generate } from './demo.ts';
export { readHealth } from './health.ts';
export { type NatsUsersOptions, writeNatsUsers } from './nats-users.ts';
export { readShards, type ShardReport } from './probes.ts';
export { ROOT_DIRECTORY } from './root.ts';
