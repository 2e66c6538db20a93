package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/redfour-go/redfour/internal/slot"
)

const formTime = 30 * time.Second // for which a cluster may form

// A cluster is the masters of a Redis Cluster, which share the slots evenly. They have no replicas.
type cluster []*server

// startCluster returns when all masters say that the cluster is well, which takes Redis two seconds at least. They keep what they know
// of each other in dir.
func startCluster(ctx context.Context, dir string, masters int) (cluster, error) {
	var c cluster
	err := c.start(ctx, dir, masters)
	if err == nil {
		err = c.awaitWell(ctx)
	}
	if err != nil {
		c.stop()
		return nil, fmt.Errorf("cluster: %w", err)
	}
	return c, nil
}

func (c *cluster) start(ctx context.Context, dir string, masters int) error {
	var busPorts []int
	for i := range masters {
		var busPort int
		s, err := start(ctx, func() []string {
			busPort = randomPort() // The default is among the ports that the kernel gives to outgoing connections.
			return []string{
				"--cluster-enabled", "yes", "--cluster-port", strconv.Itoa(busPort),
				// A master that is alone hears from nobody what its address is, and ioredis depends on it.
				"--cluster-announce-ip", "127.0.0.1",
				"--dir", dir, "--cluster-config-file", fmt.Sprintf("nodes-%d.conf", busPort),
			}
		})
		if err != nil {
			return err
		}
		*c = append(*c, s)
		busPorts = append(busPorts, busPort)
		// An epoch can be set before the servers meet only. If they all had the same, they would have to settle it.
		err = errors.Join(
			s.client.Do(ctx, "CLUSTER", "SET-CONFIG-EPOCH", i+1).Err(),
			s.client.ClusterAddSlotsRange(ctx, i*slot.Slots/masters, (i+1)*slot.Slots/masters-1).Err(),
		)
		if err != nil {
			return err
		}
	}
	// Everybody meets everybody, because gossip takes seconds.
	for i, s := range *c {
		for j := range i {
			if err := s.client.Do(ctx, "CLUSTER", "MEET", "127.0.0.1", (*c)[j].port(), busPorts[j]).Err(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *cluster) awaitWell(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, formTime)
	defer cancel()
	for {
		err := c.well(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func (c *cluster) well(ctx context.Context) error {
	for _, s := range *c {
		info, err := s.client.ClusterInfo(ctx).Result()
		if err != nil {
			return err
		}
		// Each knows who has every slot then.
		if !strings.Contains(info, "cluster_state:ok") {
			return fmt.Errorf("%s says %q", s.addr, info)
		}
	}
	return nil
}

// empty removes what a run has left.
func (c *cluster) empty(ctx context.Context) error {
	for _, s := range *c {
		if err := errors.Join(s.client.FlushAll(ctx).Err(), s.client.ScriptFlush(ctx).Err()); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) stop() {
	for _, s := range *c {
		s.stop()
	}
	*c = nil
}
