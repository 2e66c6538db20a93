package slot_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/redfour-go/redfour/internal/slot"
)

func TestSum_isThatOfTheSpecification(t *testing.T) {
	assert.Equal(t, uint16(0x31C3), slot.Sum("123456789"))
	assert.Zero(t, slot.Sum(""))
}

func TestOf_isWhatRedisAnswers(t *testing.T) {
	// CLUSTER KEYSLOT of Redis 7.0 says so.
	for key, want := range map[string]int{
		"":              0,
		"foo":           12182,
		"somekey":       11058,
		"foo{hash_tag}": 2515,
		"bar{hash_tag}": 2515,
		"hash_tag":      2515,
		"foo{}{bar}":    8363,
		"foo{{bar}}zap": 4015,
		"{bar":          4015,
		"foo{bar}{zap}": 5061,
		"bar":           5061,
		"}foo{bar}":     5061,
	} {
		assert.Equal(t, want, slot.Of(key), key)
	}
}

func TestTag(t *testing.T) {
	for key, want := range map[string]string{
		"":               "",
		"a":              "",
		"{":              "",
		"{}":             "",
		"{}{a}":          "",
		"}{a}":           "a",
		"a{b}c{d}":       "b",
		"{{a}":           "{a",
		"x{a":            "",
		"x{a}":           "a",
		"{orders:17}:42": "orders:17",
	} {
		tag, ok := slot.Tag(key)
		assert.Equal(t, want, tag, key)
		assert.Equal(t, want != "", ok, key)
	}
}
