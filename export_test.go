package redfour

import "fmt"

// What Redis is sent, for tests of the scripts alone.
var (
	AcquireScript = acquireScript.source
	LeaveScript   = leaveScript.source
	ReleaseScript = releaseScript.source
	RenewScript   = renewScript.source
	InspectScript = inspectScript.source
)

// Scripts returns every script that is sent.
func Scripts() map[string]string {
	return map[string]string{
		"acquire": AcquireScript, "leave": LeaveScript, "release": ReleaseScript, "renew": RenewScript,
		"inspect": InspectScript, "count": countScript.source, "sharded count": shardedCountScript.source,
		"sharded acquire": shardedAcquireScript.source,
		"sharded release": shardedReleaseScript.source, "sharded renew": shardedRenewScript.source, "sharded inspect": shardedInspectScript.source,
	}
}

// NamesIn returns every name of an id's keys and channels, in a cluster or elsewhere; or why there are none.
func NamesIn(namespace, id string, cluster bool) ([]string, error) {
	if err := checkLayout(namespace); err != nil && cluster {
		return nil, err
	}
	s := &server{buckets: layOut(namespace, cluster), member: "member"}
	b := s.bucket(id)
	return []string{
		b.lock(id), b.counter(), b.queue(id), b.releases(), b.census(), s.inbox(b),
		fmt.Sprint(b.counterKey), fmt.Sprint(b.prefix) + "x",
	}, nil
}

// Masters returns for how many masters a Lock keeps what sends scripts to them.
func Masters(l *Lock) int {
	t := l.server.topology
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.masters)
}
