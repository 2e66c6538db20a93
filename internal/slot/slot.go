// Package slot tells where Redis Cluster keeps a key, as "Key distribution model" in the specification of Redis Cluster
// says: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/.
package slot

import "strings"

// Slots is how many there are in a cluster.
const Slots = 16384

// Of returns the slot of a key.
func Of(key string) int {
	if tag, ok := Tag(key); ok {
		key = tag
	}
	return int(Sum(key)) % Slots
}

// Tag returns the hash tag of a key, which is all of it that counts: what stands between the first "{" and the first "}" after
// it, if that is not empty.
func Tag(key string) (tag string, ok bool) {
	_, after, _ := strings.Cut(key, "{")
	tag, _, ok = strings.Cut(after, "}")
	if !ok || tag == "" {
		return "", false
	}
	return tag, true
}

// Sum returns the CRC16 of s, in the variant called XMODEM: polynomial 0x1021, nothing reflected, begun at 0.
func Sum(s string) uint16 {
	var sum uint16
	for i := range len(s) {
		sum = sum<<8 ^ table[byte(sum>>8)^s[i]]
	}
	return sum
}

var table = func() (t [256]uint16) {
	for i := range t {
		sum := uint16(i) << 8
		for range 8 {
			if sum&0x8000 != 0 {
				sum = sum<<1 ^ 0x1021
			} else {
				sum <<= 1
			}
		}
		t[i] = sum
	}
	return t
}()
